import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_invsr.image_processor import InvSRImageProcessor


processor = InvSRImageProcessor()


def picture(mode: str, size=(6, 4)) -> Image.Image:
    """A gradient, 6 wide and 4 high."""
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    rgba = Image.fromarray(np.stack([ramp, ramp.T.reshape(ramp.shape), 255 - ramp, ramp // 2 + 64], axis=-1))
    if mode == "L":
        return Image.fromarray(ramp)
    if mode == "I;16":
        return Image.fromarray(ramp.astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(ramp.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(ramp.astype(np.float32) / 255)
    return rgba.convert(mode)


@pytest.mark.parametrize(
    "mode, grey, has_alpha",
    [
        ("RGB", False, False),
        ("RGBA", False, True),
        ("L", True, False),
        ("LA", True, True),
        ("P", False, False),
        ("PA", False, True),
        ("CMYK", False, False),
        ("YCbCr", False, False),
        ("1", True, False),
        ("I;16", True, False),
        ("I", True, False),
        ("F", True, False),
    ],
)
def test_pil_modes(mode, grey, has_alpha):
    image = picture("RGBA").convert("P").convert("PA") if mode == "PA" else picture(mode)
    (item,) = processor.preprocess(image)
    assert item.pixels.shape == (3, 4, 6) and item.grey == grey and (item.alpha is not None) == has_alpha
    if mode in ("L", "I;16", "I", "F"):
        values = item.pixels.float() / 255 if item.pixels.dtype == torch.uint8 else item.pixels
        expected = torch.from_numpy(np.array(picture("F")))
        torch.testing.assert_close(values[0], expected, atol=1 / 255, rtol=0)


def test_transparent_palette_and_grey_colour_key(tmp_path):
    for mode, key in (("P", 0), ("L", 0), ("RGB", (0, 0, 0))):
        path = tmp_path / f"{mode}.png"
        picture(mode).save(path, transparency=key)
        (item,) = processor.preprocess(Image.open(path))
        assert item.alpha is not None and item.grey == (mode == "L")


def test_colour_key_of_16_bits(tmp_path):
    values = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000
    Image.fromarray(values).save(tmp_path / "grey.png", transparency=4000)
    (item,) = processor.preprocess(Image.open(tmp_path / "grey.png"))
    torch.testing.assert_close(item.pixels[0], torch.from_numpy(values / 65535).float())
    assert np.array_equal(np.array(item.alpha) == 0, values == 4000) and item.grey


def test_exif_orientation_is_applied(tmp_path):
    image = picture("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    (item,) = processor.preprocess(Image.open(tmp_path / "turned.png"))
    expected = np.rot90(np.array(image), k=-1)
    assert np.array_equal(item.pixels.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda rgb: rgb,
        lambda rgb: rgb.astype(np.float64) / 255,
        lambda rgb: rgb.astype(np.float32)[None] / 255,
        lambda rgb: rgb.astype(np.uint16) * 257,
        lambda rgb: torch.from_numpy(rgb).permute(2, 0, 1),
        lambda rgb: torch.from_numpy(rgb).permute(2, 0, 1)[None] / 255,
        lambda rgb: (torch.from_numpy(rgb).permute(2, 0, 1) / 255).double(),
        lambda rgb: [rgb],
        lambda rgb: [Image.fromarray(rgb)],
    ],
)
def test_arrays_and_tensors_mean_the_same(make):
    rgb = np.array(picture("RGB"))
    (item,) = processor.preprocess(make(rgb))
    values = item.pixels.float() / 255 if item.pixels.dtype == torch.uint8 else item.pixels
    torch.testing.assert_close(values, torch.from_numpy(rgb).permute(2, 0, 1) / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "image, grey, has_alpha",
    [
        (np.zeros((4, 6)), True, False),
        (np.zeros((4, 6, 1)), True, False),
        (np.zeros((4, 6, 2)), True, True),
        (np.zeros((4, 6, 4)), False, True),
        (np.zeros((4, 6), dtype=bool), True, False),
        (np.zeros((4, 6, 3), dtype=np.int16), False, False),
        (torch.zeros(4, 6), True, False),
        (torch.zeros(1, 4, 6), True, False),
        (torch.zeros(4, 4, 6, dtype=torch.bfloat16), False, True),
        (torch.zeros(4, 6, dtype=torch.bool), True, False),
    ],
)
def test_channels(image, grey, has_alpha):
    (item,) = processor.preprocess(image)
    assert item.pixels.shape == (3, 4, 6) and item.grey == grey and (item.alpha is not None) == has_alpha


def test_batches_and_nested_lists_come_one_by_one():
    assert len(processor.preprocess(torch.zeros(3, 3, 4, 4))) == 3
    assert len(processor.preprocess([np.zeros((2, 4, 4, 3)), picture("L"), torch.zeros(1, 3, 4, 4)])) == 4


@pytest.mark.parametrize(
    "image, error, message",
    [
        ([], ValueError, "at least one image"),
        (None, TypeError, "got <class 'NoneType'>"),
        ("photo.png", TypeError, "got <class 'str'>"),
        (np.zeros(5), ValueError, "shape"),
        (np.zeros((1, 1, 4, 4, 3)), ValueError, "shape"),
        (np.zeros((3, 8, 8)), ValueError, r"1, 2, 3 or 4 channels in the layout \(H, W, C\)"),
        (torch.zeros(8, 8, 3), ValueError, r"1, 2, 3 or 4 channels in the layout \(C, H, W\)"),
        (np.zeros((0, 8, 3)), ValueError, "must have pixels, got 0x8"),
        (Image.new("RGB", (0, 4)), ValueError, "must have pixels, got 4x0"),
        (np.zeros((1, 1, 3)), ValueError, "at least 2 pixels high and wide, got 1x1"),
        (Image.new("L", (9, 1)), ValueError, "at least 2 pixels high and wide, got 1x9"),
        (np.full((4, 4, 3), 1.5), ValueError, r"values in \[0, 1\], got 1.5 to 1.5"),
        (torch.full((3, 4, 4), -0.1), ValueError, r"values in \[0, 1\], got -0.1"),
        (np.full((4, 4, 3), np.nan), ValueError, "NaN"),
        (torch.full((3, 4, 4), float("inf")), ValueError, "NaN or infinity"),
        (np.full((4, 4, 3), -1, dtype=np.int16), ValueError, "no negative values, got -1"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), ValueError, "8 or 16 bits, such as uint8 or uint16, got int64"),
        (np.zeros((4, 4, 3), dtype=complex), ValueError, "integers or floats, got complex128"),
        (Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), ValueError, "from 0 to 65535"),
    ],
)
def test_unusable_images_are_refused(image, error, message):
    with pytest.raises(error, match=message):
        processor.preprocess(image)


def test_floats_may_be_off_by_rounding():
    (item,) = processor.preprocess(torch.tensor([-1e-6, 0.5, 1 + 1e-6]).expand(3, 4, 3))
    assert item.pixels.min() == 0 and item.pixels.max() == 1


def test_read_only_arrays_are_copied(recwarn):
    array = np.asarray(picture("L"))
    assert not array.flags.writeable
    processor.preprocess(array)
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_results_come_back_in_the_inputs_mode(mode):
    (item,) = processor.preprocess(picture(mode))
    result = torch.full((3, 16, 24), 0.5)
    image = processor.postprocess(result, item, "pil")
    assert image.mode == mode and image.size == (24, 16)
    assert image.convert("L").getpixel((3, 3)) == 128
    if "A" in mode:
        expected = picture(mode).getchannel("A").resize((24, 16), Image.Resampling.LANCZOS)
        assert np.array_equal(np.array(image.getchannel("A")), np.array(expected))
    channels = 4 if "A" in mode else 3
    results = [processor.postprocess(result, item, "np")]
    assert processor.collect(results, "pt").shape == (1, channels, 16, 24)
    array = processor.collect(results, "np")
    assert array.shape == (1, 16, 24, channels) and array.min() >= 0 and array.max() <= 1


def test_results_of_several_sizes_come_as_a_list():
    results = [torch.zeros(3, 16, 24), torch.zeros(3, 16, 16)]
    assert [array.shape for array in processor.collect(results, "np")] == [(16, 24, 3), (16, 16, 3)]
    assert [tensor.shape for tensor in processor.collect(results, "pt")] == [(3, 16, 24), (3, 16, 16)]
