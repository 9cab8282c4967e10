"""Where the backbone of a group lies: a module or folder a placement, behind the promises of `base.Placement`."""
