"""The scene of `rsedge demo`, generated from a seed."""
