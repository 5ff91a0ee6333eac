"""What may be changed about the walk from noise to a song, one file each; the fields of a request are in `acestep.controls`.

Each file has the numbers (a frozen dataclass or a function of tensors `[frames, channels]` of one item) and a `resolve` from a request.
"""
