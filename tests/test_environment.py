"""What a run says of the ground it stood on."""

import asyncio
import platform

import pytest
from test_samples import NOW, Told

from fanmark.loadgen.counters import Reading
from fanmark.loadgen.environment import client_host, environment, labels_of, on_this_host
from fanmark.loadgen.errors import ScenarioError


def test_labels_are_the_users_own_words() -> None:
    assert labels_of(["gpu=h100", "note=a = b", "empty="]) == {"gpu": "h100", "note": "a = b", "empty": ""}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["gpu"], "--label gpu: must be KEY=VALUE, with a KEY of letters, digits and _, such as gpu=h100"),
        (["a-b=1"], "--label a-b=1: must be KEY=VALUE"),
        (["1=1"], "--label 1=1: must be KEY=VALUE"),
        (["a=1", "a=2"], "--label a=2: a is given twice"),
    ],
)
def test_a_label_that_is_none(given: list[str], said: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        labels_of(given)
    assert str(caught.value).startswith(said)


def test_servers_tell_what_they_tell_and_no_more() -> None:
    telling, silent = Told([NOW]), Told([None])
    telling.max_model_len = 4096
    reading = Reading("vllm", {"kv_capacity_tokens": 524_288.0}, {"block_size": "128", "sliding_window": "None"})
    found = environment({"gpu": "h100"}, None, {"a": telling, "b": silent}, {"a": reading, "b": None}, {"a": True})
    assert found == {
        "labels": {"gpu": "h100"},
        "client": None,
        "servers": {
            "a": {
                "server": "vllm",
                "model": "m",
                "max_model_len": 4096,
                "metrics": "vllm",
                "kv_capacity_tokens": 524_288.0,
                "cache": {"block_size": "128"},
                "same_host": True,
            },
            "b": {
                "server": "vllm",
                "model": "m",
                "max_model_len": None,
                "metrics": None,
                "kv_capacity_tokens": None,
                "cache": {},
                "same_host": None,
            },
        },
    }


def test_the_clients_host() -> None:
    found = client_host()
    assert found["python"] == platform.python_version()
    assert found["cpus"] >= found["cpus_usable"] >= 1
    assert found["packages"]["aiohttp"].count(".") >= 2


@pytest.mark.parametrize(
    ("urls", "own"),
    [
        (["http://127.0.0.1:8000/v1"], True),
        (["http://localhost:8000/v1"], True),
        (["http://[::1]:8000/v1"], True),
        (["https://192.0.2.1/v1"], False),  # of no machine: kept for documentation
        (["http://192.0.2.1/v1", "http://127.0.0.2/v1"], True),
        ([f"http://{'a' * 64}/v1"], None),  # of no name that there can be
        ([f"http://{'a' * 64}/v1", "http://192.0.2.1/v1"], None),
    ],
)
def test_whose_address_it_is(urls: list[str], own: bool | None) -> None:
    assert asyncio.run(on_this_host(urls)) is own
