"""The recipe as a graph: models, what was captured of them, what they taught, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BOX_WIDTH, BOX_HEIGHT = 206, 74
ACROSS, DOWN, MARGIN, HEAD = 66, 18, 8, 26
MOST_CHARACTERS = 27  # of a line in a box


@dataclass(frozen=True)
class Node:
    """A box. lines: its text, the first one large. colour: class of its edge. missing: not made yet."""

    key: str
    lines: list[str]
    colour: str = ""
    missing: bool = False


@dataclass(frozen=True)
class Box:
    """A node at its place."""

    node: Node
    x: float
    y: float
    width: int = BOX_WIDTH
    height: int = BOX_HEIGHT


@dataclass(frozen=True)
class Edge:
    """A curve between two boxes. path: of an SVG."""

    path: str
    colour: str
    missing: bool


@dataclass(frozen=True)
class Graph:
    """Columns of boxes from left to right, and curves between them. heads: of the columns, with their x."""

    width: int
    height: int
    heads: list[tuple[float, str]]
    boxes: list[Box]
    edges: list[Edge]


def graph(columns: Sequence[tuple[str, Sequence[Node]]], links: Sequence[tuple[str, str]]) -> Graph:
    """Lay out columns of nodes, each with a head, and links between nodes by their keys; all are centred."""
    columns = [(head, nodes) for head, nodes in columns if nodes]
    rows = max((len(nodes) for _, nodes in columns), default=0)
    height = HEAD + rows * (BOX_HEIGHT + DOWN) - DOWN + 2 * MARGIN
    placed: dict[str, Box] = {}
    heads = []
    for number, (head, nodes) in enumerate(columns):
        x = MARGIN + number * (BOX_WIDTH + ACROSS)
        heads.append((x + BOX_WIDTH / 2, head))
        free = (rows - len(nodes)) * (BOX_HEIGHT + DOWN) / 2
        for at, node in enumerate(nodes):
            placed[node.key] = Box(node, x, HEAD + MARGIN + free + at * (BOX_HEIGHT + DOWN))
    edges = [_edge(placed[a], placed[b]) for a, b in links if a in placed and b in placed]
    width = 2 * MARGIN + len(columns) * (BOX_WIDTH + ACROSS) - ACROSS
    return Graph(width, round(height), heads, list(placed.values()), edges)


def _edge(a: Box, b: Box) -> Edge:
    x1, y1 = a.x + a.width, a.y + a.height / 2
    x2, y2 = b.x - 5, b.y + b.height / 2  # the arrow's head takes the rest
    bend = (x2 - x1) / 2
    path = f"M{x1:g} {y1:g}C{x1 + bend:g} {y1:g} {x2 - bend:g} {y2:g} {x2:g} {y2:g}"
    return Edge(path, a.node.colour, a.node.missing or b.node.missing)
