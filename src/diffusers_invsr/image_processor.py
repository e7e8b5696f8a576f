"""Images in and out: every kind of picture to RGB pixels, and results back to the kind that was asked for."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput
from PIL import Image, ImageOps


ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
GREY_MODES = ("1", "L", "LA", "La", "I", "F")
ROWS_AT_ONCE = 128
ROUNDING = 1e-4  # by which floats may exceed their range, as after resampling


@dataclass
class InputImage:
    r"""
    One image as the pipeline works on it.

    Args:
        pixels (`torch.Tensor`): RGB of shape `(3, height, width)`: uint8, or float32 in [0, 1]. On the CPU.
        alpha (`PIL.Image.Image`, *optional*): Transparency, of mode "L" (8 bits) or "F" (in [0, 1]).
        grey (`bool`): Whether the image had no colours.
    """

    pixels: torch.Tensor
    alpha: Image.Image | None
    grey: bool


class InvSRImageProcessor:
    """Reads what users pass as `image` and gives results in the type they ask for."""

    def preprocess(self, image: PipelineImageInput) -> list[InputImage]:
        r"""
        Read images of any supported kind.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                PIL images of any mode, upright by their EXIF orientation; arrays `(H, W)`, `(H, W, C)` or
                `(B, H, W, C)`; tensors `(H, W)`, `(C, H, W)` or `(B, C, H, W)`. C is 1 (grey), 2 (grey, alpha),
                3 (RGB) or 4 (RGB, alpha). Floats are in [0, 1], integers of 8 or 16 bits fill their type's range.

        Returns:
            `list[InputImage]`: The images, one by one.

        Raises:
            ValueError: If an image is empty, thinner than 2 pixels, of another shape, or has values out of range.
            TypeError: If an image is of another type.
        """
        items = image if isinstance(image, (list, tuple)) else [image]
        images = [parsed for item in items for parsed in self._read(item)]
        if not images:
            raise ValueError("`image` must hold at least one image, got an empty list.")
        return images

    def _read(self, image) -> list[InputImage]:
        if isinstance(image, Image.Image):
            return [self._read_pil(image)]
        if isinstance(image, np.ndarray):
            layouts = {2: "(H, W)", 3: "(H, W, C)", 4: "(B, H, W, C)"}
            pixels = image
        elif isinstance(image, torch.Tensor):
            layouts = {2: "(H, W)", 3: "(C, H, W)", 4: "(B, C, H, W)"}
            pixels = image.detach().cpu()
            pixels = (pixels.float() if pixels.is_floating_point() else pixels).numpy()
            pixels = np.moveaxis(pixels, -3, -1) if pixels.ndim > 2 else pixels
        else:
            raise TypeError(f"`image` must be a PIL image, an array, a tensor or a list of them, got {type(image)}.")
        if pixels.ndim not in layouts:
            raise ValueError(f"`image` must have a shape {' or '.join(layouts.values())}, got {tuple(image.shape)}.")
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        pixels = pixels[None] if pixels.ndim == 3 else pixels
        if pixels.shape[-1] not in (1, 2, 3, 4):
            raise ValueError(
                f"`image` must have 1, 2, 3 or 4 channels in the layout {layouts[image.ndim]}, got"
                f" {tuple(image.shape)}."
            )
        return [self._split_channels(array) for array in pixels]

    def _read_pil(self, image: Image.Image) -> InputImage:
        self._check_size(image.height, image.width)
        image = ImageOps.exif_transpose(image)
        if image.mode == "I" or image.mode.startswith("I;16"):
            values = np.array(image)
            if values.min() < 0 or values.max() > 65535:  # mode I has 32 bits, but holds what was read from 16
                raise ValueError(
                    f"`image` of mode {image.mode!r} must have values from 0 to 65535, got"
                    f" {values.min()} to {values.max()}."
                )
            channels = [values]
            if "transparency" in image.info:
                channels.append(np.where(values == image.info["transparency"], 0, 65535))
            return self._split_channels(np.stack(channels, axis=-1).astype(np.uint16))
        if image.mode in ALPHA_MODES or "transparency" in image.info:
            image = image.convert("LA" if image.mode in GREY_MODES else "RGBA")
        elif image.mode == "1":
            image = image.convert("L")
        elif image.mode not in ("L", "F"):
            image = image.convert("RGB")
        pixels = np.array(image)
        return self._split_channels(pixels[..., None] if pixels.ndim == 2 else pixels)

    def _split_channels(self, pixels: np.ndarray) -> InputImage:
        """An image `(H, W, C)` of any dtype."""
        height, width, channels = pixels.shape
        self._check_size(height, width)
        pixels = self._normalize(pixels)
        alpha = None
        if channels in (2, 4):
            alpha = Image.fromarray(np.ascontiguousarray(pixels[..., -1]))
            pixels = pixels[..., :-1]
        grey = pixels.shape[-1] == 1
        pixels = torch.from_numpy(np.require(pixels.transpose(2, 0, 1), requirements=["C", "W"]))
        return InputImage(pixels=pixels.expand(3, -1, -1), alpha=alpha, grey=grey)

    @staticmethod
    def _check_size(height: int, width: int):
        if height == 0 or width == 0:
            raise ValueError(f"`image` must have pixels, got {height}x{width} (height x width).")
        if height == 1 or width == 1:
            raise ValueError(
                f"`image` must be at least 2 pixels high and wide, got {height}x{width} (height x width)."
            )

    @staticmethod
    def _normalize(pixels: np.ndarray) -> np.ndarray:
        """Values as uint8, or as float32 in [0, 1]."""
        if pixels.dtype == np.uint8:
            return pixels
        if pixels.dtype == bool:
            return pixels.astype(np.float32)
        if np.issubdtype(pixels.dtype, np.integer):
            if pixels.dtype.itemsize > 2:  # whose range no image fills
                raise ValueError(
                    f"`image` of integers must have 8 or 16 bits, such as uint8 or uint16, got {pixels.dtype}."
                )
            if pixels.min() < 0:
                raise ValueError(f"`image` of integers must have no negative values, got {pixels.min()}.")
            return (pixels / np.iinfo(pixels.dtype).max).astype(np.float32)
        if not np.issubdtype(pixels.dtype, np.floating):
            raise ValueError(f"`image` must hold integers or floats, got {pixels.dtype}.")
        if not np.isfinite(pixels).all():
            raise ValueError("`image` must hold finite values, got NaN or infinity.")
        if pixels.min() < -ROUNDING or pixels.max() > 1 + ROUNDING:
            raise ValueError(f"`image` of floats must have values in [0, 1], got {pixels.min()} to {pixels.max()}.")
        pixels = pixels.astype(np.float32)
        return np.clip(pixels, 0, 1, out=pixels)

    def postprocess(self, result: torch.Tensor, item: InputImage, output_type: str) -> Image.Image | torch.Tensor:
        r"""
        Give a result the kind of its input, with the transparency of the latter enlarged by Lanczos.

        Args:
            result (`torch.Tensor`): Pixels `(3, height, width)` in [0, 1], or latents. Float32, on the CPU.
            item ([`InputImage`]): The input.
            output_type (`str`): `"pil"`, `"np"`, `"pt"` or `"latent"`.

        Returns:
            A PIL image (grey where the input was); for the other types, also for `"np"`, a tensor `(channels, height,
            width)` for [`~InvSRImageProcessor.collect`], with 4 channels where the input had transparency.
        """
        if output_type == "pil":
            return self._to_pil(result, item)
        return result if output_type == "latent" else self._with_alpha(result, item.alpha)

    @staticmethod
    def collect(
        results: list[Image.Image] | list[torch.Tensor], output_type: str
    ) -> list[Image.Image] | list | np.ndarray | torch.Tensor:
        r"""
        Results of [`~InvSRImageProcessor.postprocess`] in the type that was asked for.

        Args:
            results (`list`):
                PIL images, or tensors `(C, H, W)`. Tensors are taken out of the list one by one where they are copied,
                so that memory does not hold all of them twice.
            output_type (`str`): `"pil"`, `"np"`, `"pt"` or `"latent"`.

        Returns:
            The PIL images; or an array `(B, H, W, C)` or a tensor `(B, C, H, W)`, in [0, 1] but for latents. Where
            shapes differ, a list of `(H, W, C)` or `(C, H, W)`.
        """
        if output_type == "pil":
            return results
        if len({result.shape for result in results}) > 1:
            return [result.permute(1, 2, 0).numpy() for result in results] if output_type == "np" else results
        if len(results) == 1:
            batch = results[0][None]
        else:
            batch = results[0].new_empty(len(results), *results[0].shape)
            for item in batch:
                item.copy_(results.pop(0))
        return batch.permute(0, 2, 3, 1).numpy() if output_type == "np" else batch

    @staticmethod
    def _with_alpha(result: torch.Tensor, alpha: Image.Image | None) -> torch.Tensor:
        if alpha is None:
            return result
        height, width = result.shape[-2:]
        values = np.array(alpha.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
        values = torch.from_numpy(values / 255 if alpha.mode == "L" else values.clip(0, 1))
        return torch.cat([result, values[None]])

    @staticmethod
    def _to_pil(result: torch.Tensor, item: InputImage) -> Image.Image:
        height, width = result.shape[-2:]
        pixels = torch.empty(height, width, 3, dtype=torch.uint8, device="cpu")
        for start in range(0, height, ROWS_AT_ONCE):  # a float copy of the whole would double the memory
            rows = (result[:, start : start + ROWS_AT_ONCE] * 255).round_().byte()
            pixels[start : start + ROWS_AT_ONCE] = rows.permute(1, 2, 0)
        image = Image.fromarray(pixels.numpy())
        if item.grey:
            image = image.convert("L")
        if item.alpha is not None:
            alpha = item.alpha.resize(image.size, Image.Resampling.LANCZOS)
            if alpha.mode == "F":
                alpha = Image.fromarray((np.array(alpha).clip(0, 1) * 255).round().astype(np.uint8))
            image.putalpha(alpha)
        return image
