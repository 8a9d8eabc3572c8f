"""A worker's sums on their way to the driver, and the sum over all workers.

Rules of the file:
1. A snapshot holds all sums so far, so that one that comes twice changes nothing. It is counts and sums, and has a ceiling: names and
   buckets are bounded (tally.MOST_NAMES, COARSE), arms and targets are the scenario's (tests/test_snapshots.py).
2. What is counted by log bucket is told as bucket and count while those are few, else as the counts of all coarse buckets from the first to
   the last. All else has a place in a vector, which is told once, when it is new.
3. The driver adds up at fixed times and not when a snapshot comes: a thousand workers are a thousand additions of vectors each time.
"""

from array import array
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fanmark.loadgen.records import JOINED
from fanmark.loadgen.tally import ArmTally, Histogram, Tally

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BY_BUCKET = ("ttft", "latency")  # of an arm; the run's are beside them
_LEAST_BUCKET, _BUCKETS = -7_000, 14_000  # of records.gap_bucket: from below a microsecond to days
MOST_BUCKETS = 200  # of a counter, before neighbours are joined
COARSE = _BUCKETS // JOINED  # so many are there then
_FLOATS = ("sums", "squares")
Exemplars = dict[tuple[str, str, Hashable], dict[int, tuple[float, int]]]  # of histograms, by arm, attribute and key


class Buckets(NamedTuple):
    """Counts by log bucket: which (two bytes each) and how often (four); or, of the coarse ones from the `first` on, how often alone."""

    which: bytes
    often: bytes
    first: int | None = None


class Part(NamedTuple):
    """What a number of the vector is: of an arm (or of the run: ""), an attribute's own value, or that of a counter's `key`; with `bounds`
    the first of a histogram's counts, behind which its sum stands."""

    arm: str
    attribute: str
    key: Hashable = None
    bounds: tuple[float, ...] | None = None

    @property
    def size(self) -> int:
        return 1 if self.bounds is None else len(self.bounds) + 2


@dataclass(frozen=True)
class Packed:
    """All sums of a tally, the `number`th time. `new` are the parts that stand in the vector `values` behind those told before. `buckets`
    are by arm ("": the run) and attribute."""

    number: int
    new: list[Part]
    values: bytes
    buckets: dict[tuple[str, str], Buckets]
    exemplars: Exemplars
    begun: list[float]


class Packer:
    """Packs one worker's tally, again and again."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._at: dict[tuple[str, str, Hashable], int] = {}
        self._values = array("d")
        self._number = 0

    def pack(self) -> Packed:
        """The sums as they are now."""
        self._number += 1
        new, exemplars, tally = list[Part](), Exemplars(), self._tally
        self._put(new, "", "chunks", None, tally.chunks)
        self._put(new, "", "coalesced", None, tally.coalesced)
        buckets = {("", "send_delay"): _buckets(tally.send_delay), ("", "ttft"): _buckets(tally.ttft)}
        for name, arm in tally.arms.items():
            for attribute, key, value in _parts(arm):
                if attribute in _BY_BUCKET:
                    buckets[name, attribute] = _buckets(value)
                    continue
                self._put(new, name, attribute, key, value)
                if isinstance(value, Histogram) and value.exemplars:
                    exemplars[name, attribute, key] = dict(value.exemplars)
        return Packed(self._number, new, self._values.tobytes(), buckets, exemplars, list(tally.begun))

    def _put(self, new: list[Part], arm: str, attribute: str, key: Hashable, value: Any) -> None:
        numbers = array("d", (*value.counts, value.sum) if isinstance(value, Histogram) else (value,))
        at = self._at.setdefault((arm, attribute, key), len(self._values))
        if at == len(self._values):
            new.append(Part(arm, attribute, key, value.bounds if isinstance(value, Histogram) else None))
        self._values[at : at + len(numbers)] = numbers


def _parts(arm: ArmTally) -> Iterator[tuple[str, Hashable, Any]]:
    """All that an arm holds: attribute, key, and a number or histogram; a whole counter where it is by log bucket."""
    for attribute, held in vars(arm).items():
        if isinstance(held, dict) and attribute not in _BY_BUCKET:
            for key, value in held.items():
                yield attribute, key, value
        elif not isinstance(held, str):
            yield attribute, None, held


def joined(counts: Mapping[int, int]) -> Mapping[int, int]:
    """Where there are many buckets, neighbours within 2 % as one: nothing that is shown while a run goes on needs more."""
    if len(counts) <= MOST_BUCKETS:
        return counts
    return {_fine(coarse): times for coarse, times in _coarse(counts).items()}


def _coarse(counts: Mapping[int, int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for bucket, times in counts.items():
        coarse = min(max((bucket - _LEAST_BUCKET) // JOINED, 0), COARSE - 1)
        found[coarse] = found.get(coarse, 0) + times
    return found


def _fine(coarse: int) -> int:
    """The bucket in the middle."""
    return coarse * JOINED + JOINED // 2 + _LEAST_BUCKET


def _buckets(counts: Counter[int]) -> Buckets:
    """Where they are many, neighbours are one in `counts` too from then on, lest each second all be joined again."""
    if len(counts) <= MOST_BUCKETS:
        which = (min(max(bucket, _LEAST_BUCKET), _LEAST_BUCKET + _BUCKETS - 1) for bucket in counts)
        return Buckets(array("h", which).tobytes(), array("I", counts.values()).tobytes())
    coarse = _coarse(counts)
    counts.clear()
    counts.update({_fine(n): times for n, times in coarse.items()})
    first = min(coarse)
    return Buckets(b"", array("I", (coarse.get(n, 0) for n in range(first, max(coarse) + 1))).tobytes(), first)


@dataclass
class _Held:
    """One worker's last snapshot: the places of its numbers among all, and the numbers; of coarse buckets the first one's place."""

    number: int
    places: "NDArray[np.int64]"
    values: "NDArray[np.float64]"
    bucket_places: "NDArray[np.int64]"
    bucket_counts: "NDArray[np.uint32]"
    coarse: "list[tuple[int, NDArray[np.uint32]]]"


@dataclass
class Sums:
    """The last snapshots of all workers."""

    _held: dict[int, _Held] = field(default_factory=dict)
    _places: dict[Part, int] = field(default_factory=dict)
    _size: int = 0
    _bucketed: dict[tuple[str, str], int] = field(default_factory=dict)
    _exemplars: Exemplars = field(default_factory=dict)
    _begun: list[float] = field(default_factory=list)

    def take(self, worker: int, packed: Packed) -> None:
        """A worker's sums in place of those that it told before; what comes a second time changes nothing."""
        import numpy as np

        before = self._held.get(worker)
        if before is not None and packed.number <= before.number:
            return
        places = before.places if before is not None else np.zeros(0, np.int64)
        if packed.new:
            places = np.concatenate([places, *(self._placed(part) for part in packed.new)])
        bucket_places, bucket_counts, coarse = [np.zeros(0, np.int64)], [np.zeros(0, np.uint32)], []
        for counter, told in packed.buckets.items():
            place = self._bucketed.setdefault(counter, len(self._bucketed))
            often = np.frombuffer(told.often, np.uint32)
            if told.first is not None:
                coarse.append((place * COARSE + told.first, often))
                continue
            bucket_places.append(
                np.frombuffer(told.which, np.int16).astype(np.int64) + (place * _BUCKETS - _LEAST_BUCKET)
            )
            bucket_counts.append(often)
        self._held[worker] = _Held(
            packed.number, places, np.frombuffer(packed.values),
            np.concatenate(bucket_places), np.concatenate(bucket_counts), coarse,
        )  # fmt: skip
        for of, exemplars in packed.exemplars.items():
            self._exemplars.setdefault(of, {}).update(exemplars)
        self._begun = max(self._begun, packed.begun, key=len)  # the workers begin at one instant

    def _placed(self, part: Part) -> range:
        at = self._places.setdefault(part, self._size)
        self._size = max(self._size, at + part.size)
        return range(at, at + part.size)

    def into(self, tally: Tally, workers: Collection[int] | None = None) -> None:
        """The sum of the last snapshots of all workers, or of these, becomes the tally's."""
        import numpy as np

        values, buckets = np.zeros(self._size), np.zeros(len(self._bucketed) * _BUCKETS, np.int64)
        coarse = np.zeros(len(self._bucketed) * COARSE, np.int64)
        for held in [self._held[n] for n in (self._held if workers is None else workers) if n in self._held]:
            values[held.places] += held.values
            buckets[held.bucket_places] += held.bucket_counts
            for at, counts in held.coarse:
                coarse[at : at + len(counts)] += counts
        arms = {name: ArmTally(arm.topology) for name, arm in tally.arms.items()}
        run: dict[str, Any] = {}
        told = values.tolist()
        for part, at in self._places.items():
            if part.arm:
                self._put(arms[part.arm], part, told[at : at + part.size])
            else:
                run[part.attribute] = int(told[at])
        for (name, attribute), place in self._bucketed.items():
            mine = buckets[place * _BUCKETS : (place + 1) * _BUCKETS]
            mine[_fine(0) - _LEAST_BUCKET :: JOINED] += coarse[place * COARSE : (place + 1) * COARSE]
            (full,) = np.nonzero(mine)
            found = Counter(dict(zip((full + _LEAST_BUCKET).tolist(), mine[full].tolist(), strict=True)))
            if name:
                setattr(arms[name], attribute, found)
            else:
                run[attribute] = found
        tally.become(arms, self._begun, run)

    def _put(self, arm: ArmTally, part: Part, numbers: list[float]) -> None:
        held = getattr(arm, part.attribute)
        if part.bounds is not None:
            histogram = Histogram(part.bounds)
            histogram.counts, histogram.sum = [int(n) for n in numbers[:-1]], numbers[-1]
            histogram.exemplars = dict(self._exemplars.get((part.arm, part.attribute, part.key), {}))
            if isinstance(held, Histogram):
                setattr(arm, part.attribute, histogram)
            else:
                held[part.key] = histogram
            return
        number = numbers[0] if part.attribute in _FLOATS else int(numbers[0])
        if isinstance(held, Counter):
            held[part.key] = number  # type: ignore[assignment]  # a Counter of floats
        else:
            setattr(arm, part.attribute, number)
