"""Encode images, and search a set, on the workers of a Ray cluster.

Every machine has this package and sees the images, the model and the set's folder under the same paths. Workers read
and encode; the calling process writes the set, in the order of the images. A task of a worker that dies is done again
by another one, so no image is missing and none is added twice. Searches are answered by actors that each hold some of
the shards; distances are bit for bit those that one machine finds.
"""
