"""Pictures: reading files, and the test pictures that ship with the package."""

from zfcore.data.images import FoundImages, Picture, find_images, load_image, read_image

__all__ = ["FoundImages", "Picture", "find_images", "load_image", "read_image"]
