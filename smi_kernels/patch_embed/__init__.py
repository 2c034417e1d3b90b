"""From pixels to the tokens of the kept patches, under a roll and a flip."""
