"""sae_zoo: train and compare sparse autoencoders on language-model activations."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_zoo.saes.io import load_sae

__version__ = "0.1.0"
__all__ = ["load_sae"]


def __getattr__(name: str):
    # Imported when used: `import sae_zoo` alone stays instant.
    if name == "load_sae":
        from sae_zoo.saes.io import load_sae

        return load_sae
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
