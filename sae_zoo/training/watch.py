"""Seeing a training collapse while it happens: pure functions of what was measured."""

from __future__ import annotations

# A run that loses this share of its latents, beyond the fewest that were ever dead, has collapsed: sound ones lose a
# twentieth at most (analysis/LOG.md).
LOST_SHARE = 0.2
# From one look at the curves to the next, FVU rises by less than this factor, and by less than this much, in a sound
# run.
_JUMP_FACTOR, _JUMP = 1.5, 0.1


def collapse(*, dead: float, least_dead: float, fvu: float, fvu_before: float) -> str | None:
    """The collapse that a run shows, in words; None if there is none.

    Args:
        dead, least_dead: share of dead latents now, and the least so far.
        fvu, fvu_before: fraction of variance unexplained of two batches, now and some steps ago; NaN where there is
            none.
    """
    if dead - least_dead >= LOST_SHARE:
        return f"{dead:.0%} of the latents are dead, {least_dead:.0%} were before"
    if fvu > fvu_before * _JUMP_FACTOR and fvu - fvu_before > _JUMP:
        return f"FVU jumped from {fvu_before:.3f} to {fvu:.3f}"
    return None
