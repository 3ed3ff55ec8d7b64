"""Workers on a virtual clock, and the description of the clusters that they run on."""
