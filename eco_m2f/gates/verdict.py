"""What a frontier or a search says, in plain lines."""

from collections.abc import Sequence

from .frontier import Row
from .mixture import CONFIDENCE, Gain
from .search import best

MOST_LINES = 12


def verdict(rows: Sequence[Row], name: str) -> list[str]:
    """Which gates beat the mixture of fixed exits; name: of the quality. Empty without a gate.

    Of many gates the lines name those that beat it, the largest gain first, and count the others.
    """
    gates = [row for row in rows if row.policy == "gate" and row.gain]
    proven = sorted((row for row in gates if row.gain.is_proven), key=lambda row: -row.gain.gain)
    lines = [] if proven or not gates else ["No gate beats the mixture of fixed exits."]
    shown = gates if len(gates) <= MOST_LINES else proven[:MOST_LINES]
    lines += [f"{label(row, gates)}: {about(row.gain, name)}" for row in shown]
    if len(shown) < len(gates):
        lines.append(f"{len(proven)} of {len(gates)} gates beat the mixture of fixed exits.")
    if proven and len(gates) > 1:
        lines.append(f"Each p is that of one gate; {len(gates)} gates were compared.")
    return lines


def label(row: Row, gates: Sequence[Row]) -> str:
    """A gate's beta, and its K and loss where those of the gates differ."""
    words = [f"gate beta {row.beta:.3g}"]
    if len({gate.max_exit for gate in gates}) > 1:
        words.append(f"K {row.max_exit}")
    if len({gate.loss for gate in gates}) > 1:
        words.append(str(row.loss))
    return ", ".join(words)


def about(gain: Gain, name: str) -> str:
    """A gain in plain words."""
    percent, interval = f"{100 * CONFIDENCE:.0f} %", f"{gain.low:.2g} to {gain.high:.2g}"
    cost = ", which costs no more" if gain.mixture.is_fixed else " at equal cost"
    of = f"{gain.gain:+.2f} {name} over {gain.mixture}{cost}"
    if gain.is_proven:
        return f"{of} ({percent} interval {interval}, p {gain.p:.2g})"
    if gain.high < 0:
        return f"{of}: it is worse ({percent} interval {interval}, p {gain.p:.2g})"
    return f"{of}: no gain is proven, the {percent} interval ({interval}) includes 0 (p {gain.p:.2g})"


def conclusion(saved: Row, rows: Sequence[Row], by_quality: bool, name: str) -> list[str]:
    """Which of gates, fixed exits and the mixture a search found best, and what its file then holds.

    saved, rows: as `search_budget` returns them. by_quality: whether the limit was one of GFLOPs.
    """
    mixture = next((row for row in rows if row.policy == "mixture"), None)
    if mixture and best([saved, mixture], by_quality) is mixture:
        part = mixture.images[mixture.max_exit] / sum(mixture.images.values())
        exits = " and ".join(str(k) for k, n in mixture.images.items() if n)
        words = f"mixture of exits {exits}, {100 * part:.0f} % of the images at exit {mixture.max_exit}, at random"
        lines = [f"Best: {words}: {_reached(mixture, name)}. A gate file cannot hold a mixture."]
        lines.append(f"Saved is the best of gates and fixed exits: {_described(saved, name)}.")
    elif saved.policy == "fixed":
        gates = " No gate is better." if any(row.policy == "gate" for row in rows) else ""
        lines = [f"Best: {_described(saved, name)}.{gates} The file sends every image to exit {saved.max_exit}."]
    else:
        aside = f"; the mixture of fixed exits: {_reached(mixture, name)}" if mixture else ""
        lines = [f"Best: {_described(saved, name)}{aside}."]
    return lines + [f"{label(row, [row])}: {about(row.gain, name)}" for row in [saved] if row.gain]


def _described(row: Row, name: str) -> str:
    words = f"fixed exit {row.max_exit}" if row.policy == "fixed" else label(row, [row])
    return f"{words}, {_reached(row, name)}"


def _reached(row: Row, name: str) -> str:
    return f"{row.score:.2f} {name} at {row.total_gflops:.4g} GFLOPs"
