"""The compiled steps of a layer, in the order in which a token meets them; see README.md."""
