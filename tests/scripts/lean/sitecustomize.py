"""Python runs this first where it is on PYTHONPATH: a script then starts in less than two thirds of the time."""

from tests.scripts.hiding import LARGE, Hide

Hide({*LARGE, "torchvision"})
