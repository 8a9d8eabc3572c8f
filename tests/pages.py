"""Reading a page of HTML in tests: strictly, so that what a browser would mend is an error here."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input", "hr"}
SVG_LEAVES = {"rect", "line", "circle", "polyline"}


@dataclass
class Node:
    tag: str
    attributes: dict[str, str]
    children: list["Node"] = field(default_factory=list)
    words: str = ""

    def all(self, tag: str, **attributes: str) -> list["Node"]:
        """The nodes below with this tag and these attributes, in order."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        own = [self] if self.tag == tag and all(self.attributes.get(k) == v for k, v in wanted.items()) else []
        return own + [node for child in self.children for node in child.all(tag, **attributes)]

    @property
    def text(self) -> str:
        """All text within, in order."""
        return self.words + "".join(child.text for child in self.children)

    def rows(self) -> list[list[str]]:
        """The cells of a table."""
        return [[cell.text for cell in row.children] for row in self.all("tr")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag}: {names}"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_LEAVES, f"<{tag}/> is no end of it in HTML"
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> ends {self.open[-1].tag}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(Node("#text", {}, words=data))


def parse(html: str) -> Node:
    """The tree of a page, in which every element is ended, no id comes twice and all that is pointed at is there."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [reader.root]
    nodes = _nodes(reader.root)
    ids = [node.attributes["id"] for node in nodes if "id" in node.attributes]
    assert len(set(ids)) == len(ids) and not any(" " in each for each in ids), ids
    assert all(node.attributes["href"][1:] in ids for node in nodes if node.attributes.get("href", "").startswith("#"))
    return reader.root


def _nodes(node: Node) -> list[Node]:
    return [node, *(each for child in node.children for each in _nodes(child))]


def loaded(root: Node) -> list[str]:
    """What the page would fetch."""
    fetching = ("src", "href", "srcset", "data", "poster", "action")
    return [n.attributes[a] for n in _nodes(root) for a in fetching if not n.attributes.get(a, "#").startswith("#")]
