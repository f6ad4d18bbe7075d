"""The models, one file each: linen modules that know logical axis names and never a mesh."""
