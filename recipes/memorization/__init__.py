"""Does generation require memorisation? Quality against memory, over the noise frozen in the training
images."""
