"""What a run is, where it is kept, and the loop that drives it."""
