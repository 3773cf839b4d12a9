"""Choose a radius by measured distances: between protected images, to altered copies, and between plain images."""
