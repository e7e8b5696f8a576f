import functools
import http.server
import io
import itertools
import multiprocessing
import os
import pickle
import signal
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_invsr.image_files import read_image
from diffusers_invsr.training import TrainingError
from diffusers_invsr.training.data import (
    CropDataset,
    CropStream,
    SkipReport,
    list_files,
    make_dataset,
    make_loader,
)


CROP = 16


def picture(seed, width=24, height=20, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def sixteen_bits():
    return np.random.default_rng(3).integers(0, 65536, (20, 24), dtype=np.uint16)


def encoded(seed, image_format="PNG"):
    data = io.BytesIO()
    Image.fromarray(picture(seed)).save(data, image_format)
    return data.getvalue()


def write_images(folder, count, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + count):
        (folder / f"{seed:03}.png").write_bytes(encoded(seed))
    return str(folder)


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_workers_are_out_of_reach_of_signals_to_the_group(tmp_path):
    """A launcher signals the training's whole group, which needs its workers until it has stopped."""
    dataset = make_dataset([write_images(tmp_path / "images", 2)], CROP, 0)
    batches = iter(make_loader(dataset, 1, 0, 1, 0, 1, False))
    next(batches)
    workers = multiprocessing.active_children()
    assert workers and all(os.getpgid(worker.pid) != os.getpgid(0) for worker in workers)


def write_shards(folder, counts):
    first = 0
    for number, count in enumerate(counts):
        members = {f"{seed:03}.png": encoded(seed) for seed in range(first, first + count)}
        write_tar(folder / f"{number:03}.tar", members | {"note.json": b"{}"})
        first += count
    return f"webdataset:{folder}/{{000..{len(counts) - 1:03}}}.tar"


def take(loader, count):
    batches = list(itertools.islice(loader, count))
    assert len(batches) == count
    return batches


def assert_same_batches(batches, others):
    assert [batch["keys"] for batch in batches] == [batch["keys"] for batch in others]
    for batch, other in zip(batches, others):
        assert torch.equal(batch["hr"], other["hr"])


def name_of(key):
    return os.path.basename(key.split("|")[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 10)


@pytest.fixture(scope="module")
def damaged_folder(tmp_path_factory):
    """Every kind of file that can be read, and of those that cannot."""
    folder = tmp_path_factory.mktemp("damaged")
    good = Image.fromarray(picture(0))
    good.save(folder / "plain.png")
    Image.fromarray(picture(1, channels=1)).save(folder / "grey.png")
    Image.fromarray(picture(2, channels=4)).save(folder / "rgba.png")
    Image.fromarray(sixteen_bits()).save(folder / "sixteen.png")
    good.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    good.quantize(64).save(folder / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    good.save(folder / "rotated.jpg", exif=exif)

    jpeg = encoded(4, "JPEG")
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    png = encoded(5)
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image at all")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (100, CROP - 1)).save(folder / "flat.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    return folder


BAD = {
    "cut.jpg": "truncated",
    "cut.png": "truncated",
    "empty.png": "not an image",
    "text.png": "not an image",
    "dot.png": "smaller than 16",
    "flat.png": "smaller than 16",
    "bomb.png": "with too many pixels",
}
GOOD = ["plain.png", "grey.png", "rgba.png", "sixteen.png", "cmyk.jpg", "palette.png", "rotated.jpg"]


# --- One sample ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crops_per_image", [None, 3])
def test_sample_is_the_region_that_its_key_names(folder, crops_per_image):
    dataset = CropDataset([folder], CROP, crops_per_image=crops_per_image)
    flips = 0
    for position in range(40):
        sample = dataset[position]
        file, size, _, box, flip = sample["key"].split("|")
        left, top, side = map(int, box.split(","))
        with Image.open(file) as image:
            expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, top : top + side, left : left + side]
        flips += flip == "flipped"
        assert int(size) == os.path.getsize(file)
        assert sample["hr"].dtype == torch.uint8
        assert torch.equal(sample["hr"], expected.flip(-1) if flip == "flipped" else expected)
    assert 8 < flips < 32


def test_crops_reach_every_corner_and_flips_are_even_and_can_be_left_out(tmp_path):
    write_images(tmp_path, 1)
    dataset = CropDataset([str(tmp_path)], CROP)
    keys = [dataset[position]["key"].split("|")[-2:] for position in range(400)]
    places = {tuple(map(int, box.split(",")[:2])) for box, _ in keys}
    assert places == set(itertools.product(range(24 - CROP + 1), range(20 - CROP + 1)))
    assert 160 < sum(flip == "flipped" for _, flip in keys) < 240
    plain = CropDataset([str(tmp_path)], CROP, horizontal_flip=False)
    assert {plain[position]["key"].split("|")[-1] for position in range(50)} == {"upright"}


def test_image_of_exactly_the_crop_size_is_taken(tmp_path):
    Image.fromarray(picture(0, CROP, CROP)).save(tmp_path / "a.png")
    assert CropDataset([str(tmp_path)], CROP)[0]["hr"].shape == (3, CROP, CROP)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("grey.png", lambda: np.repeat(picture(1, channels=1)[..., None], 3, axis=2)),
        ("rgba.png", lambda: picture(2, channels=4)[..., :3]),
        ("sixteen.png", lambda: np.repeat((sixteen_bits() / 257).round().astype(np.uint8)[..., None], 3, axis=2)),
        ("palette.png", lambda: np.array(Image.fromarray(picture(0)).quantize(64).convert("RGB"))),
    ],
)
def test_every_kind_of_pixels_becomes_8_bit_rgb(damaged_folder, tmp_path, name, expected):
    (tmp_path / "list.txt").write_text(str(damaged_folder / name))
    sample = CropDataset([str(tmp_path / "list.txt")], CROP, horizontal_flip=False)[0]
    left, top, side = map(int, sample["key"].split("|")[3].split(","))
    region = expected()[top : top + side, left : left + side].copy()
    assert torch.equal(sample["hr"], torch.from_numpy(region).permute(2, 0, 1))


@pytest.mark.parametrize("name", ["cmyk.jpg", "rotated.jpg"])
def test_jpegs_are_upright_and_rgb(damaged_folder, tmp_path, name):
    (tmp_path / "list.txt").write_text(str(damaged_folder / name))
    sample = CropDataset([str(tmp_path / "list.txt")], 20, horizontal_flip=False)[0]
    image = read_image(damaged_folder / name)[0]
    assert image.size == ((20, 24) if name == "rotated.jpg" else (24, 20))
    left, top, side = map(int, sample["key"].split("|")[3].split(","))
    region = np.array(image.convert("RGB"))[top : top + side, left : left + side]
    assert torch.equal(sample["hr"], torch.from_numpy(region.copy()).permute(2, 0, 1))


# --- Order and resuming ----------------------------------------------------------------------------------------------


def test_every_epoch_has_each_file_once_in_another_order(folder):
    dataset = CropDataset([folder], CROP)
    epochs = [[name_of(dataset[10 * epoch + i]["key"]) for i in range(len(dataset))] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [f"{number:03}.png" for number in range(10)]
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_sample_depends_on_the_seed_and_the_position_alone(folder):
    dataset, again, other = (CropDataset([folder], CROP, seed=seed) for seed in (1, 1, 2))
    forwards = [dataset[position] for position in range(25)]
    backwards = [again[position] for position in reversed(range(25))][::-1]
    assert [sample["key"] for sample in forwards] == [sample["key"] for sample in backwards]
    pairs = [(sample["key"], other[position]["key"]) for position, sample in enumerate(forwards)]
    assert any(name_of(a) != name_of(b) for a, b in pairs)
    assert any(a.split("|")[3:] != b.split("|")[3:] for a, b in pairs)


@pytest.mark.parametrize("crops_per_image", [1, 2])
def test_crops_come_again_with_crops_per_image(folder, crops_per_image):
    dataset = CropDataset([folder], CROP, crops_per_image=crops_per_image)
    epochs = [{dataset[10 * epoch + i]["key"] for i in range(10)} for epoch in range(4)]
    assert len(set.union(*epochs)) == 10 * crops_per_image
    assert epochs[0] == epochs[crops_per_image]
    always_new = CropDataset([folder], CROP)
    assert len({always_new[position]["key"] for position in range(40)}) > 35


@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_crops_that_come_again_do_not_depend_on_where_the_data_are(tmp_path, kind):
    crops = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write = write_images if kind == "folder" else lambda folder, count: write_shards(folder, [count])
        dataset = make_dataset([write(tmp_path / name, 5)], CROP, crops_per_image=2)
        samples = [dataset[n] for n in range(10)] if kind == "folder" else itertools.islice(dataset, 10)
        crops.append([sample["hr"] for sample in samples])
    assert all(torch.equal(a, b) for a, b in zip(*crops))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", ["folder", "damaged_folder"])
def test_loader_resumes_exactly(request, source, num_workers):
    dataset = CropDataset([str(request.getfixturevalue(source))], CROP)
    whole = take(make_loader(dataset, 3), 9)
    fresh = CropDataset([str(request.getfixturevalue(source))], CROP)
    resumed = take(make_loader(fresh, 3, start_batch=5, num_workers=num_workers), 4)
    assert_same_batches(resumed, whole[5:])
    assert [batch["skipped"] for batch in resumed] == [batch["skipped"] for batch in whole[5:]]
    assert whole[0]["hr"].shape == (3, 3, CROP, CROP)


def test_two_processes_see_what_one_sees_in_two_micro_batches(folder):
    dataset = CropDataset([folder], CROP)
    alone = take(make_loader(dataset, 2), 5)
    halves = [take(make_loader(dataset, 2, rank, 2), 3) for rank in range(2)]
    assert_same_batches([batch for pair in zip(*halves) for batch in pair][:5], alone)
    # The five micro-batches are one epoch of ten files.
    assert len({name_of(key) for batch in alone for key in batch["keys"]}) == 10


# --- What cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_folder_is_read_with_a_report(damaged_folder, num_workers):
    dataset = CropDataset([str(damaged_folder)], CROP)
    report = SkipReport()
    names = set()
    for batch in take(make_loader(dataset, 7, num_workers=num_workers), 4):
        report.add(batch["skipped"])
        names |= {name_of(key) for key in batch["keys"]}
    assert names == set(GOOD)
    assert {os.path.basename(file): reason for file, reason in report.reasons.items()} == BAD
    summary = report.summary()
    assert summary.startswith("Skipped 7 files: ")
    assert "2 truncated (cut.jpg, cut.png)" in summary
    assert "1 with too many pixels (bomb.png)" in summary


def test_bad_file_is_replaced_by_the_next_good_one_and_not_opened_again(tmp_path):
    write_images(tmp_path, 6)
    (tmp_path / "003.png").write_text("text")
    dataset = CropDataset([str(tmp_path)], CROP)
    samples = [dataset[position] for position in range(6)]
    place = next(place for place, sample in enumerate(samples) if sample["skipped"])
    assert name_of(samples[place]["key"]) == name_of(samples[(place + 1) % 6]["key"])
    assert samples[place]["skipped"] == [(str(tmp_path / "003.png"), "not an image")]
    assert sum(bool(sample["skipped"]) for sample in samples) == 1
    (tmp_path / "003.png").write_bytes(encoded(3))
    assert dataset[place]["key"] == samples[place]["key"]
    assert name_of(CropDataset([str(tmp_path)], CROP)[place]["key"]) == "003.png"


def test_whether_a_file_is_bad_does_not_depend_on_the_crop(tmp_path):
    values = np.full((40, 40), 0.5, dtype=np.float32)
    values[0, 0] = 2  # which most crops leave out
    Image.fromarray(values).save(tmp_path / "a.tif")
    for position in range(6):
        with pytest.raises(TrainingError, match="no usable image: 1 damaged"):
            CropDataset([str(tmp_path)], CROP)[position]


def test_file_that_is_gone_is_skipped(tmp_path):
    write_images(tmp_path, 3)
    (tmp_path / "list.txt").write_text("000.png\n\n gone.png \n002.png\n")
    dataset = CropDataset([str(tmp_path / "list.txt")], CROP)
    report = SkipReport()
    for position in range(3):
        report.add(dataset[position]["skipped"])
    assert report.reasons == {str(tmp_path / "gone.png"): "missing"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_folder_without_a_usable_image_is_an_error(tmp_path, num_workers):
    (tmp_path / "a.png").write_text("text")
    (tmp_path / "b.png").write_text("text")
    Image.new("RGB", (3, 3)).save(tmp_path / "c.png")
    loader = make_loader(CropDataset([str(tmp_path)], CROP), 1, num_workers=num_workers)
    with pytest.raises(TrainingError) as error:
        next(iter(loader))
    assert str(error.value) == "`sources` has no usable image: 2 not an image, 1 smaller than 16."


def test_report_counts_each_file_once_and_is_restored():
    report = SkipReport()
    report.add([("x/a.jpg", "truncated"), ("x/b.jpg", "truncated")])
    report.add([("x/a.jpg", "truncated")])
    restored = SkipReport()
    restored.load_state_dict(report.state_dict())
    restored.add([("x/b.jpg", "truncated"), ("y/c.png", "missing")])
    assert len(report) == 2 and len(restored) == 3
    assert restored.summary() == "Skipped 3 files: 2 truncated (a.jpg, b.jpg), 1 missing (c.png)"
    restored.add([("x/c.jpg", "truncated"), ("x/d.jpg", "truncated")])
    assert "4 truncated (a.jpg, b.jpg, c.jpg, ...)" in restored.summary()


# --- Sources ---------------------------------------------------------------------------------------------------------


def test_folders_are_searched_in_the_order_of_their_paths(tmp_path):
    write_images(tmp_path / "b", 2)
    write_images(tmp_path / "a" / "deep", 1, first=7)
    (tmp_path / "notes.txt").write_text("b/000.png")
    expected = [str(tmp_path / name) for name in ("a/deep/007.png", "b/000.png", "b/001.png")]
    assert list_files(str(tmp_path)) == expected
    assert list_files(f"{tmp_path}[:2]") == expected[:2]
    assert list_files(f"{tmp_path}[:99]") == expected
    assert list_files(str(tmp_path / "notes.txt")) == [expected[1]]


def test_sources_are_joined_with_their_limits(tmp_path):
    first, second = write_images(tmp_path / "lsdir", 3), write_images(tmp_path / "ffhq", 4, first=10)
    files = CropDataset([first, f"{second}[:2]", second], CROP).files
    assert [name_of(file) for file in files] == [f"{n:03}.png" for n in (0, 1, 2, 10, 11, 10, 11, 12, 13)]


def test_folder_with_brackets_in_its_name_is_a_folder(tmp_path):
    source = write_images(tmp_path / "set[:1]", 3)
    assert len(list_files(source)) == 3
    assert len(list_files(f"{source}[:2]")) == 2


def test_bad_sources_are_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_images(tmp_path / "images", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.bin").write_bytes(b"\xff\xfe\x00\xff")
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict({"number": [1, 2]}).to_parquet(tmp_path / "table" / "train.parquet")
    for sources, message in (
        ([], "`sources` must be a list of at least one"),
        ([3], "`sources` must be a list of at least one"),
        (["{tmp}/none"], "There is no folder or list"),
        (["{tmp}/none[:3]"], "There is no folder or list"),
        (["{tmp}/empty"], "has no images"),
        (["{tmp}/images[:0]"], r"must be \[:N\] with N >= 1, got \[:0\]"),
        (["{tmp}/images[:x]"], r"got \[:x\]"),
        (["{tmp}/images[2:5]"], r"got \[2:5\]"),
        (["{tmp}/images[:-1]"], r"got \[:-1\]"),
        (["{tmp}/images/000.png"], "got the image file"),
        (["{tmp}/data.bin"], "must be a text file"),
        (["{tmp}/images", "webdataset:a.tar"], "mixes 'webdataset:a.tar' and"),
        (["webdataset:{tmp}/none.tar"], "There is no tar file"),
        (["webdataset:{tmp}/{{3..1}}.tar"], r"The range \{3..1\} .* is empty"),
        (["datasets:{tmp}/none"], "could not be opened"),
        (["datasets:{tmp}/table"], r"no column of type Image, only \['number'\]"),
    ):
        sources = [source.format(tmp=tmp_path) if isinstance(source, str) else source for source in sources]
        with pytest.raises(TrainingError, match=message):
            make_dataset(sources, CROP)


def test_bad_arguments_are_refused(folder, tmp_path):
    for source in (folder, write_shards(tmp_path, [1])):
        wrong = {"crop_size": (1, 16.0), "seed": (-1, True), "crops_per_image": (0,)}
        for argument, value in ((argument, value) for argument, values in wrong.items() for value in values):
            with pytest.raises(ValueError, match=f"`{argument}` must be an integer .*, got {value!r}"):
                make_dataset([source], **{"crop_size": CROP, argument: value})


def test_bad_arguments_of_the_loader_are_refused(folder):
    dataset = CropDataset([folder], CROP)
    for arguments in (
        {"batch_size": 0},
        {"num_processes": 0},
        {"process_index": -1},
        {"process_index": 2, "num_processes": 2},
        {"start_batch": -1},
        {"num_workers": 1.5},
    ):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be"):
            make_loader(dataset, **{"batch_size": 1, **arguments})
    for position in (-1, 1.0, "0"):
        with pytest.raises(ValueError, match="`position` must be"):
            dataset[position]


def test_bad_shuffle_buffer_and_wrong_kind_of_source_are_refused(folder, tmp_path):
    stream = write_shards(tmp_path, [1])
    with pytest.raises(ValueError, match="`shuffle_buffer` must be"):
        make_dataset([stream], CROP, shuffle_buffer=0)
    with pytest.raises(TrainingError, match="got the stream"):
        CropDataset([stream], CROP)
    with pytest.raises(TrainingError, match="A stream is required"):
        CropStream([folder], CROP)
    with pytest.raises(TrainingError, match="has no images in 1 shards"):
        next(CropStream([stream], CROP).samples(part=1, parts=2))


# --- Streams ---------------------------------------------------------------------------------------------------------


def stream_names(samples, count):
    return [name_of(sample["key"]) for sample in itertools.islice(samples, count)]


@pytest.mark.parametrize("shuffle_buffer", [1, 4, 100])
def test_stream_gives_each_image_once_a_round(tmp_path, shuffle_buffer):
    stream = make_dataset([write_shards(tmp_path, [4, 2, 3])], CROP, shuffle_buffer=shuffle_buffer)
    assert isinstance(stream, CropStream)
    names = stream_names(stream, 27)
    rounds = [names[:9], names[9:18], names[18:]]
    for names in rounds:
        assert sorted(names) == [f"{number:03}.png" for number in range(9)]
    assert len({tuple(names) for names in rounds}) > 1
    (tmp_path / "one").mkdir()
    one = CropStream([write_shards(tmp_path / "one", [9])], CROP, shuffle_buffer=shuffle_buffer)
    names = stream_names(one, 9)
    tail = names[-min(shuffle_buffer, 9) :]  # what is left in the buffer at the end
    assert (sorted(names) == names and sorted(tail) == tail) == (shuffle_buffer == 1)
    assert shuffle_buffer == 1 or sorted(tail) != tail


@pytest.mark.parametrize("counts", [[4, 2, 3, 3], [8, 4], [12]], ids=["more shards", "fewer", "one"])
def test_readers_of_a_stream_share_no_image(tmp_path, counts):
    stream = CropStream([write_shards(tmp_path, counts)], CROP)
    parts = []
    for part in range(3):
        names = stream_names(stream.samples(part, 3), 40)
        length = len(set(names))
        assert len(set(names[:length])) == len(set(names[length : 2 * length])) == length
        parts.append(set(names))
    assert sum(map(len, parts)) == len(set.union(*parts)) == sum(counts)


@pytest.mark.parametrize("crops_per_image", [None, 2])
@pytest.mark.parametrize("start", [1, 6, 7, 20])
def test_stream_resumes_exactly_even_at_bad_images(tmp_path, start, crops_per_image):
    members = {f"{seed}.png": encoded(seed) for seed in range(4)}
    bad = {f"bad{number}.png": b"text" for number in range(3)}
    write_tar(tmp_path / "a.tar", members | bad)
    stream = CropStream([f"webdataset:{tmp_path}/a.tar"], CROP, 3, crops_per_image, shuffle_buffer=3)
    whole = list(itertools.islice(stream, start + 8))
    resumed = list(itertools.islice(stream.samples(start=start), 8))
    assert [sample["key"] for sample in resumed] == [sample["key"] for sample in whole[start:]]
    assert all(torch.equal(a["hr"], b["hr"]) for a, b in zip(resumed, whole[start:]))
    report = SkipReport()
    for sample in whole:
        report.add(sample["skipped"])
    assert start < 6 or {os.path.basename(name) for name in report.reasons} == set(bad)
    distinct = {sample["key"] for sample in itertools.islice(stream, 200)}
    assert len(distinct) == 8 if crops_per_image else len(distinct) > 100


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("start_batch", [3, 4])
def test_loader_of_a_stream_resumes_exactly(tmp_path, num_workers, start_batch):
    source = write_shards(tmp_path, [4, 2, 3, 5, 3, 4])
    options = {"process_index": 1, "num_processes": 2, "num_workers": num_workers}
    whole = take(make_loader(CropStream([source], CROP), 2, **options), start_batch + 4)
    resumed = take(make_loader(CropStream([source], CROP), 2, **options, start_batch=start_batch), 4)
    assert_same_batches(resumed, whole[start_batch:])


def test_processes_and_workers_of_a_stream_share_no_image(tmp_path):
    source = write_shards(tmp_path, [3] * 4)
    seen = []
    for rank in range(2):
        batches = take(make_loader(CropStream([source], CROP), 3, rank, 2, num_workers=2), 2)
        seen += [name_of(key) for batch in batches for key in batch["keys"]]
    assert len(seen) == len(set(seen)) == 12


def test_damaged_shard_keeps_what_came_before(tmp_path):
    source = write_shards(tmp_path, [4, 4])
    data = (tmp_path / "001.tar").read_bytes()
    (tmp_path / "001.tar").write_bytes(data[: 2 * (512 + 2048)])
    report = SkipReport()
    names = set()
    for sample in itertools.islice(CropStream([source], CROP), 30):
        report.add(sample["skipped"])
        names.add(name_of(sample["key"]))
    assert {"000.png", "001.png", "002.png", "003.png", "004.png"} <= names and "007.png" not in names
    assert report.reasons == {str(tmp_path / "001.tar"): "truncated"}


def test_stream_without_a_usable_image_is_an_error(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": b"text", "b.png": b"text"})
    with pytest.raises(ValueError, match="no usable image: 2 not an image"):
        next(iter(CropStream([f"webdataset:{tmp_path}/a.tar"], CROP)))


def test_bad_images_at_both_ends_of_a_round_are_no_error(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": b"text", "b.png": encoded(0), "c.png": b"text"})
    stream = CropStream([f"webdataset:{tmp_path}/a.tar"], CROP, shuffle_buffer=1)
    assert stream_names(stream, 12) == ["b.png"] * 12


def test_storage_that_fails_is_an_error(tmp_path):
    source = write_shards(tmp_path, [2, 2])
    stream = CropStream([source], CROP)
    (tmp_path / "001.tar").unlink()
    with pytest.raises(FileNotFoundError):
        list(itertools.islice(stream, 10))


def test_stream_from_any_storage_of_fsspec(tmp_path):
    import fsspec

    source = write_shards(tmp_path, [3, 2])
    memory = fsspec.filesystem("memory")
    memory.makedirs("/shards", exist_ok=True)
    for number in range(2):
        memory.pipe(f"/shards/{number:03}.tar", (tmp_path / f"{number:03}.tar").read_bytes())
    remote = CropStream(["webdataset:memory://shards/{000..001}.tar"], CROP)
    for sample, local in itertools.islice(zip(remote, CropStream([source], CROP)), 12):
        assert name_of(sample["key"]) == name_of(local["key"])
        assert torch.equal(sample["hr"], local["hr"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream_over_http(tmp_path, num_workers):
    pytest.importorskip("aiohttp")
    write_shards(tmp_path, [3, 2])

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        source = f"webdataset:http://127.0.0.1:{server.server_port}/{{000..001}}.tar"
        batch = take(make_loader(CropStream([source], CROP), 5, num_workers=num_workers), 1)[0]
    finally:
        server.shutdown()
        server.server_close()
    assert {name_of(key) for key in batch["keys"]} == {f"{number:03}.png" for number in range(5)}


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    """Parquet files of two splits, as on the Hub, with the images in a column of their type."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub") / "data"
    folder.mkdir()
    features = datasets.Features({"label": datasets.Value("int64"), "photo": datasets.Image()})
    splits = {"train-00000-of-00002": range(3), "train-00001-of-00002": range(3, 6), "test-00000-of-00001": [9]}
    for name, seeds in splits.items():
        rows = [{"label": seed, "photo": {"bytes": encoded(seed), "path": f"{seed:03}.png"}} for seed in seeds]
        if name.startswith("train-00000"):
            rows.append({"label": 0, "photo": {"bytes": b"text", "path": "text.png"}})
            rows.append({"label": 0, "photo": None})
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{name}.parquet")
    return folder.parent


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_from_datasets(dataset_folder, num_workers):
    source = f"datasets:{dataset_folder}"
    whole = take(make_loader(CropStream([source], CROP), 4, num_workers=num_workers), 6)
    report = SkipReport()
    for batch in whole:
        report.add(batch["skipped"])
    assert {name_of(key) for batch in whole for key in batch["keys"]} == {f"{number:03}.png" for number in range(6)}
    assert sorted(report.reasons.values()) == ["missing", "not an image"]
    resumed = take(make_loader(CropStream([source], CROP), 4, num_workers=num_workers, start_batch=3), 3)
    assert_same_batches(resumed, whole[3:])


def test_split_of_datasets_can_be_named(dataset_folder):
    assert set(stream_names(CropStream([f"datasets:{dataset_folder}:test"], CROP), 3)) == {"009.png"}
    with pytest.raises(ValueError, match="could not be opened"):
        CropStream([f"datasets:{dataset_folder}:none"], CROP)


# --- Processes -------------------------------------------------------------------------------------------------------


def test_datasets_can_be_sent_to_spawned_workers(folder, tmp_path):
    for dataset in (CropDataset([folder], CROP), CropStream([write_shards(tmp_path, [3])], CROP)):
        copy = pickle.loads(pickle.dumps(dataset))
        assert next(iter(make_loader(copy, 2)))["keys"] == next(iter(make_loader(dataset, 2)))["keys"]


def test_workers_leave_interrupts_to_the_main_process(folder):
    loader = iter(make_loader(CropDataset([folder], CROP), 2, num_workers=1))
    first = next(loader)
    for worker in loader._workers:
        os.kill(worker.pid, signal.SIGINT)
    batches = [next(loader) for _ in range(6)]
    assert_same_batches([first, *batches], take(make_loader(CropDataset([folder], CROP), 2), 7))
