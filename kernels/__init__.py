"""The kernels of the counterfactual. Imported as `cammask_fast.kernels`; imports nothing of cammask_fast.

Shapes are written in these letters, here and in cammask_fast:

    N   images of a batch                       K   classes
    H W height and width of an image, pixels    E   width of the image features (the joint space of both towers)
    P   patches of an image                     D   width of the transformer, A * d
    L   tokens: the CLS token, then P patches   A   attention heads
    G   patches per side, P = G * G             d   width of a head
    p   side of a patch, pixels                 M   images of a larger pool, from which N are taken
"""
