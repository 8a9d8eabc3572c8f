"""fanmark: measures how agent fan-out multiplies inference. This package only gives the rooms one import name."""
