"""Measures and judges. Takes arrays, strings and callables; imports nothing else of edgestill.

`metrics` scores text against references, `agreement` compares logits, `bootstrap` and
`intervals` give intervals, `gate` compares what was measured with what the profile allows.
"""
