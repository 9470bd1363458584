"""The ways down: patches of the receptive field for networks that are read, whole maps for the others."""
