"""A browser of latents: ``python -m analysis.dashboard RUN... [--output FILE] [--latents N]`` writes one HTML file that
needs nothing else, of one run or of several side by side.

:mod:`content` gathers what is shown as plain values, :mod:`frontier` where the runs stand among those of their sweeps,
:mod:`page` puts both into the page (``page.html``, ``page.css``, ``*.js``).
"""
