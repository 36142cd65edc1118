"""What a low-rank layer does while it trains, in the terms of the scaling theory."""

from headstart.monitor.monitor import RECORDS, Monitor, Record
from headstart.monitor.quantities import Quantities, quantities

__all__ = ["RECORDS", "Monitor", "Quantities", "Record", "quantities"]
