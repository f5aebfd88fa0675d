"""The block diagram of the core, drawn from the table of its wires as a flow chart in Mermaid."""

from collections import defaultdict

from mmfree_jax.hardware.core.core import UNITS, WIRES

MANY = 5  # names on an arrow, at most; more of them are counted
HANDSHAKES = ("valid", "ready", "start", "take", "room", "reserve", "finish")


def mermaid() -> str:
    """Return the diagram: a box for each unit, an arrow for each pair of units, with what goes along it.

    Handshakes are left out. `core` is the outside: host and memory.
    """
    between = defaultdict(list)
    for source, sinks in WIRES.items():
        unit, _, port = source.partition(".")
        for sink in sinks:
            if not port.endswith(HANDSHAKES):
                between[unit, sink.partition(".")[0]].append(port)
    boxes = ["    core([host and memory])", *(f"    {name}[{name} unit]" for name in UNITS)]
    arrows = [f"    {a} -->|{_label(ports)}| {b}" for (a, b), ports in between.items()]
    return "\n".join(["flowchart TB", *boxes, *arrows])


def _label(ports: list[str]) -> str:
    return ", ".join(ports) if len(ports) <= MANY else f"{len(ports)} settings"


if __name__ == "__main__":
    print(mermaid())
