"""How far a fit can be believed: bootstraps, back-tests, sensitivity, simulated ladders."""
