"""Learning to learn: what is learned, the inner algorithm and the meta-gradient's estimator are three slots.

`adapt` is the inner loop, `estimators` the third slot, and each further file a method: a choice of the three.
"""
