"""From image files to a protected set."""
