"""What `upscale` writes: names, formats, sizes, pixels and metadata."""

import io
from pathlib import Path

import numpy as np
import pytest
from helpers import files_below, run_command
from image_makers import make_image, save_images
from PIL import ExifTags, Image, ImageCms

from diffusers_invsr.image_files import save_image


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CMYK = b"\0" * 16 + b"CMYK" + b"\0" * 108


@pytest.mark.parametrize(
    "options, results",
    [
        ([], ["a.JPG", "a.png", "b.webp", "c.png"]),
        (["--format", "png"], ["a.png", "a_2.png", "b.png", "c.png"]),
        (["--format", "jpg", "--suffix", "_x4"], ["a_x4.jpg", "a_x4_2.jpg", "b_x4.jpg", "c_x4.jpg"]),
        (["--format", "webp"], ["a.webp", "a_2.webp", "b.webp", "c.webp"]),
    ],
    ids=["keep", "png", "jpg", "webp"],
)
def test_names_and_formats(folder, model, options, results):
    save_images("in/a.JPG", "in/a.png", "in/b.webp", "in/c.bmp")
    run_command("upscale", "in", "-o", "out", "--model", model, *options)
    assert files_below("out") == results
    for name in results:
        with Image.open(f"out/{name}") as image:
            assert image.size == (48, 40)
            assert image.format == {"jpg": "JPEG", "png": "PNG", "ebp": "WEBP"}[name.lower()[-3:]]


@pytest.mark.parametrize("name", ["b.png", "new/b.jpeg", "b.webp"])
def test_output_file(folder, model, name):
    save_images("a.png")
    run_command("upscale", "a.png", "-o", name, "--model", model, "--scale", 2.5, "--steps", 2, "--color-fix", "ycbcr")
    assert Image.open(name).size == (30, 25)


def test_an_output_file_determines_its_format(folder, model):
    save_images("a.png")
    for name, image_format in (("b.jpeg", "jpg"), ("c.PNG", "png")):
        run_command("upscale", "a.png", "-o", name, "--format", image_format, "--model", model)
    assert files_below(".") == ["a.png", "b.jpeg", "c.PNG"]


def test_existing_results(folder, model):
    save_images("a.png")
    Path("out").mkdir()
    Path("out/a.png").write_text("old")
    assert "--overwrite" in run_command("upscale", "a.png", "-o", "out", "--model", model)
    assert Path("out/a.png").read_text() == "old"
    run_command("upscale", "a.png", "-o", "out", "--model", model, "--overwrite")
    assert Image.open("out/a.png").size == (48, 40)


def test_results_depend_only_on_the_seed(folder, model):
    save_images("a.png", "b.png")
    for out, inputs, seed in (("one", ["b.png"], 3), ("two", ["a.png", "b.png"], 3), ("other", ["b.png"], 4)):
        run_command("upscale", *inputs, "-o", out, "--model", model, "--seed", seed, "--tile-size", 8)
    one, two, other = (Path(out, "b.png").read_bytes() for out in ("one", "two", "other"))
    assert one == two != other


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
@pytest.mark.parametrize("source", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_metadata(folder, model, source, image_format):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Camera"
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ExifImageWidth: 12, ExifTags.Base.ExposureTime: 0.5}
    save_images(source, exif=exif.tobytes(), icc_profile=SRGB)
    run_command("upscale", source, "-o", "out", "--model", model, "--format", image_format)
    with Image.open(f"out/a.{image_format}") as image:
        assert image.size == (40, 48)
        assert image.info["icc_profile"] == SRGB
        exif = image.getexif()
        assert exif.get(ExifTags.Base.Orientation, 1) == 1
        assert exif[ExifTags.Base.Make] == "Camera"
        assert exif.get_ifd(ExifTags.IFD.Exif) == {ExifTags.Base.ExifImageWidth: 40, ExifTags.Base.ExposureTime: 0.5}
        assert not {ExifTags.Base.ImageWidth, ExifTags.Base.StripOffsets} & set(exif)


def test_profile_of_other_color_space_is_left_out(folder, model):
    make_image(mode="CMYK").save("a.jpg", icc_profile=CMYK)
    run_command("upscale", "a.jpg", "-o", "out", "--model", model)
    assert "icc_profile" not in Image.open("out/a.jpg").info


@pytest.mark.parametrize(
    "mode, source, image_format, result",
    [
        ("I;16", "a.png", "png", "L"),
        ("I;16", "a.tif", "webp", "RGB"),
        ("P", "a.png", "png", "RGB"),
        ("1", "a.png", "jpg", "L"),
        ("LA", "a.png", "png", "LA"),
        ("RGBA", "a.webp", "keep", "RGBA"),
        ("RGBA", "a.png", "jpg", "RGB"),
        ("LA", "a.png", "jpg", "L"),
    ],
)
def test_kinds_of_images(folder, model, mode, source, image_format, result):
    make_image(mode=mode).save(source)
    run_command("upscale", source, "-o", "out", "--model", model, "--format", image_format)
    (name,) = files_below("out")
    assert Image.open(f"out/{name}").mode == result


def test_transparency_becomes_white_in_jpeg(folder, model):
    image = make_image(mode="RGBA")
    image.putalpha(0)
    image.save("a.png")
    run_command("upscale", "a.png", "-o", "a.jpg", "--model", model)
    assert np.array(Image.open("a.jpg")).min() >= 254


def test_damaged_exif_is_left_out(folder, model):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Camera"
    make_image().save("a.jpg", exif=exif)
    data = Path("a.jpg").read_bytes()
    Path("a.jpg").write_bytes(data.replace(b"\x01\x0f", b"\x01\x00", 1))  # now the width of the image is "Camera"
    with pytest.raises(Exception), Image.open("a.jpg") as image:  # noqa: B017 (Pillow raises various exceptions)
        image.getexif().tobytes()
    assert "without its EXIF data, which is damaged" in run_command("upscale", "a.jpg", "-o", "out", "--model", model)
    assert Image.open("out/a.jpg").size == (40, 48)  # upright


def test_exif_too_long_for_jpeg_is_left_out(folder, model):
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "x" * 70_000
    make_image().save("a.png", exif=exif)
    assert "without its EXIF data" in run_command("upscale", "a.png", "-o", "out", "--format", "jpg", "--model", model)
    assert Image.open("out/a.jpg").size == (48, 40)


def test_interrupted_writing_leaves_nothing(folder):
    class Interrupted(Image.Image):
        def save(self, file: io.IOBase, **settings):
            file.write(b"half of it")
            raise KeyboardInterrupt

    image = Interrupted()
    image._mode = "RGB"
    with pytest.raises(KeyboardInterrupt):
        save_image(image, Path("out/a.png"), make_image())
    assert files_below("out") == []
