"""Pure maths on tensors, torch only: activations, losses, metrics, the decoder constraint, and the active set."""
