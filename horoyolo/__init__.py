"""horoyolo: a YOLOv5-style detector trained over many machines with Horovod."""

__version__ = "0.1.0"
