"""Do training images come back from what is left of them? Attacks by posterior sampling, on any prior."""
