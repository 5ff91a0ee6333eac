"""Adapters of a model for single songs: LoRA, LoKr and DoRA, read from safetensors, never merged into the weights.

`files` finds them, `config` and `names` read what trainers wrote beside them and how they call the model's modules, `layout` says from a
file's header what it is and whether it fits, `load` reads it, `layers` has the formulas, `cache` keeps what was loaded, and `hooks` applies it
to the rows of a batch that asked for it.
"""
