"""The claims of the paper as verdicts on finished runs: ``python -m analysis.claims SWEEP... [--json]``.

:mod:`evidence` reads records and says which runs are repeats of one another, :mod:`compare` compares curves at matched
L0, :mod:`intervals` gives means their intervals; the claims themselves are in :mod:`frontiers`, :mod:`ablations` and
:mod:`measurements`, each a function that ends in a :class:`finding.Finding`.
"""
