"""How the values of several workers become one average. An averager never knows *when* it is used."""

from lightning_decentral.averaging.gossip import neighbor_average

__all__ = ["neighbor_average"]
