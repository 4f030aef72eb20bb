"""Know before you go: bytes, memory, FLOPs and time of a run, from its config and a short calibration."""
