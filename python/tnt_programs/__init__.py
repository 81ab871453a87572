"""What the programs train.py and predict.py are made of."""

from tnt_kernels._timm import import_timm

# Before a module of this package imports from timm: it makes that possible, or says why it is not.
import_timm()
