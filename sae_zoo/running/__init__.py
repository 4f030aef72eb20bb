"""One job, from its settings to its record: what it is to do, where its activations come from, training, devices,
turns.
"""
