"""How good a checkpoint or a bundle is: the same images, the same metrics, whichever it is."""
