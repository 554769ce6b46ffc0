import io
import os
import pickle
import zipfile

import numpy as np
import pooch
import pytest
import torch
from PIL import Image

from ibaml.data import load_mini_imagenet
from ibaml.data.sources import mini_imagenet

SPLITS = {"train": "train", "validation": "val", "test": "test"}
CATEGORY_SPLITS = {"train": "train_phase_train", "validation": "val", "test": "test"}
CLASSES = {"train": ["n03", "n01", "n02"], "validation": ["n05", "n04"], "test": ["n06", "n07"]}
NUM_IMAGES = 4


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.delenv("IBAML_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache")
    monkeypatch.setattr(mini_imagenet, "NUM_CLASSES", {split: len(names) for split, names in CLASSES.items()})
    monkeypatch.setattr(mini_imagenet, "IMAGES_PER_CLASS", NUM_IMAGES)
    root = tmp_path / "root"
    root.mkdir()
    return root


def colour(name, index):
    """A colour of its own for each image."""
    return int(name[1:]), 10 * index, 200 + index


def expected_images(split, image_size=84):
    """Plain images, classes by name."""
    colours = [colour(name, index) for name in sorted(CLASSES[split]) for index in range(NUM_IMAGES)]
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, image_size, image_size)


def encode(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def image_files(split):
    """Name, class and contents of each image: 30 x 20 pixels, as the originals are not square."""
    for name in CLASSES[split]:
        for index in reversed(range(NUM_IMAGES)):
            yield f"{name}0000{index}.jpg", name, encode(np.full((30, 20, 3), colour(name, index), dtype=np.uint8))


def csv_text(split):
    return "filename,label\n" + "".join(f"{file},{name}\n" for file, name, _ in image_files(split))


def write_folder(folder):
    (folder / "images").mkdir(parents=True)
    for split, csv_split in SPLITS.items():
        (folder / f"{csv_split}.csv").write_text(csv_text(split))
        for file, _, content in image_files(split):
            (folder / "images" / file).write_bytes(content)


def write_archive(folder, outer=""):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "mini-imagenet.zip", "w") as archive:
        archive.writestr("__MACOSX/train.csv", b"rubbish")
        for split, csv_split in SPLITS.items():
            archive.writestr(f"{outer}{csv_split}.csv", csv_text(split))
            for file, _, content in image_files(split):
                archive.writestr(f"{outer}images/{file}", content)


def pixels_and_labels(split):
    """Images of 84 x 84 pixels in mixed order, and which class each is of."""
    order = [(label, index) for index in range(NUM_IMAGES) for label in range(len(CLASSES[split]))]
    images = np.empty((len(order), 84, 84, 3), dtype=np.uint8)
    for place, (label, index) in enumerate(order):
        images[place] = colour(CLASSES[split][label], index)
    return images, [label for label, _ in order]


def cache_content(split):
    images, labels = pixels_and_labels(split)
    places = {name: [i for i, got in enumerate(labels) if got == label] for label, name in enumerate(CLASSES[split])}
    return {"image_data": images, "class_dict": places}


def category_content(split):
    images, labels = pixels_and_labels(split)
    labels = [np.int64(label) for label in labels]
    names = {name: label for label, name in enumerate(CLASSES[split])}
    return {"data": images, "labels": labels, "catname2label": {**names, "of another split": 99}}


def write_caches(folder):
    folder.mkdir(exist_ok=True)
    for split, name in SPLITS.items():
        (folder / f"mini-imagenet-cache-{name}.pkl").write_bytes(pickle.dumps(cache_content(split), protocol=2))


def write_categories(folder):
    folder.mkdir(exist_ok=True)
    for split, name in CATEGORY_SPLITS.items():
        path = folder / f"miniImageNet_category_split_{name}.pickle"
        path.write_bytes(pickle.dumps(category_content(split), protocol=4))


LAYOUTS = {
    "folder": write_folder,
    "folder in folder": lambda root: write_folder(root / "mini-imagenet"),
    "archive": write_archive,
    "archive with outer folder": lambda root: write_archive(root, "mini-imagenet/"),
    "caches": write_caches,
    "caches in folder": lambda root: write_caches(root / "mini-imagenet"),
    "categories": write_categories,
    "categories in folder": lambda root: write_categories(root / "mini-imagenet"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", SPLITS)
def test_layouts(root, layout, split):
    LAYOUTS[layout](root)
    images = load_mini_imagenet(split, root=root)
    assert images.class_names == tuple(sorted(CLASSES[split]))
    assert images.class_sizes.tolist() == [NUM_IMAGES] * len(CLASSES[split])
    assert torch.equal(images.images, expected_images(split))
    # A second time, from the cache where there is one.
    again = load_mini_imagenet(split, root=root)
    assert torch.equal(again.images, images.images) and again.class_names == images.class_names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resampling(root, layout):
    LAYOUTS[layout](root)
    images = load_mini_imagenet("test", root=root, image_size=7)
    assert images.image_shape == (3, 7, 7)
    assert torch.equal(images.images, expected_images("test", 7))


def test_resamples_with_lanczos(root):
    content = cache_content("test")
    content["image_data"] = np.random.default_rng(0).integers(0, 256, size=(8, 84, 84, 3), dtype=np.uint8)
    (root / "mini-imagenet-cache-test.pkl").write_bytes(pickle.dumps(content))
    images = load_mini_imagenet("test", root=root, image_size=28).images
    first = content["class_dict"]["n06"][0]
    reference = Image.fromarray(content["image_data"][first]).resize((28, 28), Image.Resampling.LANCZOS)
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), np.asarray(reference))


def test_root_comes_first_whatever_its_layout(root, tmp_path, monkeypatch):
    monkeypatch.setenv("IBAML_DATA", str(tmp_path / "environment"))
    write_caches(tmp_path / "environment")
    assert load_mini_imagenet("test", root=root).num_classes == 2
    write_folder(root)
    (root / "test.csv").unlink()
    write_archive(root)
    monkeypatch.setattr(mini_imagenet, "load_arrays", lambda path: pytest.fail(f"{path} read"))
    assert load_mini_imagenet("test", root=root, cache_dir=tmp_path).num_classes == 2
    assert load_mini_imagenet("train", root=root, cache_dir=tmp_path).num_classes == 3


@pytest.mark.parametrize("layout", ["folder", "archive"])
def test_decodes_once(root, tmp_path, monkeypatch, layout):
    LAYOUTS[layout](root)
    cache = tmp_path / "chosen"
    load_mini_imagenet("test", root=root, cache_dir=cache)
    monkeypatch.setattr(mini_imagenet, "decode_image", lambda *_, **__: pytest.fail("decoded again"))
    assert torch.equal(load_mini_imagenet("test", root=root, cache_dir=cache).images, expected_images("test"))
    assert len(list(cache.glob("mini-imagenet-v1-test-*-84.npz"))) == 1
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        load_mini_imagenet("test", root=root, cache_dir=cache, image_size=28)


def test_cache_follows_the_contents(root, tmp_path):
    write_folder(root)
    load_mini_imagenet("test", root=root, cache_dir=tmp_path)
    changed = root / "images" / "n0600000.jpg"
    changed.write_bytes(encode(np.full((9, 9, 3), 77, dtype=np.uint8)))
    assert load_mini_imagenet("test", root=root, cache_dir=tmp_path).images[0].eq(77).all()
    lines = (root / "test.csv").read_text().splitlines()
    lines[1:] = [line.replace(",n06", ",n99") for line in lines[1:]]
    (root / "test.csv").write_text("\n".join(lines))
    assert load_mini_imagenet("test", root=root, cache_dir=tmp_path).class_names == ("n07", "n99")


def test_pickles_are_not_cached(root, tmp_path):
    write_caches(root)
    load_mini_imagenet("test", root=root, cache_dir=tmp_path / "chosen", image_size=28)
    assert not (tmp_path / "chosen").exists()


def test_csv_of_a_spreadsheet(root):
    """Byte order mark, carriage returns, one more column."""
    write_folder(root)
    rows = csv_text("test").splitlines()
    text = "\r\n".join([rows[0] + ",note", *(row + ",x" for row in rows[1:])])
    (root / "test.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert torch.equal(load_mini_imagenet("test", root=root).images, expected_images("test"))


def test_nothing_found(root, tmp_path, monkeypatch):
    (root / "train.csv").write_text("id,price\n1,2\n")
    (root / "images").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        load_mini_imagenet("train", root=root)
    message = str(caught.value)
    for part in (
        "miniImageNet (train) not found",
        f"looked in {root}, {tmp_path / 'cache'} ($IBAML_DATA is not set)",
        "a folder mini-imagenet of each",
        "mini-imagenet-cache-train.pkl",
        "miniImageNet_category_split_train_phase_train.pickle",
        "train.csv (columns filename,label) beside a folder images",
        "mini-imagenet.zip",
        "ImageNet's terms",
    ):
        assert part in message
    assert "is there, but" not in message
    monkeypatch.setenv("IBAML_DATA", str(tmp_path / "environment"))
    with pytest.raises(FileNotFoundError, match=f"looked in {tmp_path / 'environment'}, {tmp_path / 'cache'}, and in"):
        load_mini_imagenet("validation")


def test_split_file_without_images(root):
    (root / "test.csv").write_text(csv_text("test"))
    with pytest.raises(FileNotFoundError, match="not found.*root/test.csv is there, but no folder images beside it"):
        load_mini_imagenet("test", root=root)
    write_archive(root)
    assert load_mini_imagenet("test", root=root).num_classes == 2


@pytest.mark.parametrize("layout", ["folder", "archive"])
def test_missing_image(root, layout):
    LAYOUTS[layout](root)
    if layout == "folder":
        (root / "images" / "n0700002.jpg").unlink()
    else:
        with zipfile.ZipFile(root / "mini-imagenet.zip") as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(root / "mini-imagenet.zip", "w") as archive:
            for name in content:
                if name != "images/n0700002.jpg":
                    archive.writestr(name, content[name])
    message = r"test.csv.* lists 1 images that are not in .*images.*, first n0700002.jpg; get the missing"
    with pytest.raises(FileNotFoundError, match=message):
        load_mini_imagenet("test", root=root)


def test_file_in_place_of_a_folder(root):
    write_folder(root)
    (root / "images" / "n06").write_bytes(b"")
    (root / "test.csv").write_text(csv_text("test").replace("n0600000.jpg", "n06/00000.jpg"))
    with pytest.raises(FileNotFoundError, match="first n06/00000.jpg"):
        load_mini_imagenet("test", root=root)


def test_truncated_archive(root):
    write_archive(root)
    path = root / "mini-imagenet.zip"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="mini-imagenet.zip is not an intact zip archive.*broke off. Get it again"):
        load_mini_imagenet("test", root=root)


def test_damaged_member(root):
    write_archive(root)
    path = root / "mini-imagenet.zip"
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT", content.index(b"images/n0600000.jpg")) + 8] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot read images/n0600000.jpg of .*mini-imagenet.zip .*CRC.*Get the arch"):
        load_mini_imagenet("test", root=root)


def test_member_compressed_in_an_unknown_way(root):
    write_archive(root)
    path = root / "mini-imagenet.zip"
    content = bytearray(path.read_bytes())
    directory_entry = content.rindex(b"images/n0600000.jpg") - 46
    content[directory_entry + 10] = 9  # Deflate64, as Windows uses for large archives
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot read images/n0600000.jpg of .*mini-imagenet.zip .*not supported"):
        load_mini_imagenet("test", root=root)


def test_other_archive(root):
    with zipfile.ZipFile(root / "mini-imagenet.zip", "w") as archive:
        archive.writestr("mini-imagenet-cache-test.pkl", b"")
    with pytest.raises(ValueError, match=r"has no test.csv; expected train.csv, val.csv, test.csv .*pickles, unpack"):
        load_mini_imagenet("test", root=root)


@pytest.mark.parametrize("content", [b"no image", encode(np.zeros((9, 9, 3), dtype=np.uint8))[:-30]])
def test_undecodable_image(root, content):
    write_folder(root)
    (root / "images" / "n0600003.jpg").write_bytes(content)
    with pytest.raises(
        ValueError, match="cannot read the image n0600003.jpg of .*root/images .*; replace or remove it"
    ):
        load_mini_imagenet("test", root=root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name,class\n", r"test.csv must have the columns filename,label, got \['name', 'class'\]"),
        (b"", "test.csv must have the columns filename,label, got None"),
        (b"filename,label\na.jpg,\n", r"test.csv, line 2: needs a file name and a label, got 'a.jpg' and ''"),
        (b"filename,label\na.jpg\n", r"test.csv, line 2: needs a file name and a label, got 'a.jpg' and None"),
        (b"filename,label\n../a.jpg,a\n", r"line 2: '../a.jpg' lies outside of the folder images"),
        (b"filename,label\n/etc/a.jpg,a\n", r"line 2: '/etc/a.jpg' lies outside of the folder images"),
        (b"filename,label\na.jpg,a\na.jpg,b\n", r"line 3: 'a.jpg' is listed a second time"),
        (b"\xff\xfe\x00", "test.csv is not a text file"),
        (b"filename,label\n" + b"x" * 200_000, "test.csv is not a CSV file .field larger"),
        (b"filename,label\n", "has 2 classes of 4 images, but .*test.csv has 0 classes of no images"),
        (b"filename,label\na,a\n", "has 2 classes of 4 images, but .*test.csv has 1 classes of 1 images"),
    ],
)
def test_bad_split_file(root, text, message):
    write_folder(root / "mini-imagenet")
    (root / "mini-imagenet" / "test.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load_mini_imagenet("test", root=root)


@pytest.mark.parametrize("write", [write_caches, write_categories])
@pytest.mark.parametrize("split", SPLITS)
def test_pickle_that_would_run_code(root, tmp_path, write, split):
    marker = tmp_path / "marker"

    class Harmful:
        def __reduce__(self):
            return os.system, (f'echo > "{marker}"',)

    write(root)
    path = root / (mini_imagenet.CACHE_FILES if write is write_caches else mini_imagenet.CATEGORY_FILES)[split]
    path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), "more": Harmful()}))
    with pytest.raises(ValueError, match=rf"{path.name} is refused: it names (posix|nt)\.system.*could run code"):
        load_mini_imagenet(split, root=root)
    assert not marker.exists()


@pytest.mark.parametrize("write", [write_caches, write_categories])
def test_truncated_pickle(root, write):
    write(root)
    path = root / (mini_imagenet.CACHE_FILES if write is write_caches else mini_imagenet.CATEGORY_FILES)["test"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{path.name} is not an intact pickle .*broke off"):
        load_mini_imagenet("test", root=root)


OVERLAP = {"n06": [0, 1, 2, 3], "n07": [4, 5, 6, 3]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([1, 2], "test.pkl must hold a dict of image_data, class_dict, got a list; it is another pickle"),
        ({"a": 1, 2: 3}, "must hold a dict of image_data, class_dict, got a dict of image_data, a, 2;"),
        (dict(image_data=[1]), r"image_data of .*test.pkl must be uint8 images of shape .*, got a list"),
        (dict(image_data=np.zeros((8, 84, 84, 3))), r"got an array of shape \(8, 84, 84, 3\) and dtype float64"),
        (dict(image_data=np.zeros((8, 84, 84), np.uint8)), r"got an array of shape \(8, 84, 84\) and dtype uint8"),
        (dict(image_data=np.zeros((8, 3, 84, 84), np.uint8)), r"got an array of shape \(8, 3, 84, 84\)"),
        (dict(image_data=np.zeros((8, 0, 84, 3), np.uint8)), r"got an array of shape \(8, 0, 84, 3\)"),
        (dict(class_dict=[]), "class_dict of .*test.pkl must be a dict of indices by class, got a list"),
        (dict(class_dict={1: [0]}), "class_dict of .* must have names for keys, got 1"),
        (dict(class_dict={"n06": "0"}), r"class_dict\['n06'\] of .* must be a list of integers, got a str"),
        (dict(class_dict={"n06": [0.0]}), "must be a list of integers, got a list"),
        (dict(class_dict={"n06": [[0], [1, 2]]}), "must be a list of integers, got a list"),
        (dict(class_dict={"n06": [2**70]}), "must be a list of integers, got a list"),
        (
            dict(class_dict={"n06": np.zeros((2, 2), int)}),
            r"must be a list of integers, got an array of shape \(2",
        ),
        (dict(class_dict={"n06": np.zeros(2)}), r"must be a list of integers, got an array .* dtype float64"),
        (dict(class_dict={"n06": [0, 8]}), "class 'n06' of .* has the image 8, but image_data has 8 images"),
        (dict(class_dict={"n06": (0, -1)}), "class 'n06' of .* has the image -1"),
        (dict(class_dict=OVERLAP), "image 3 of .* occurs in the classes 'n06' and 'n07'; each image must"),
        (dict(class_dict={"n06": np.array([0, 0])}), "image 0 of .* occurs in the classes 'n06' and 'n06'"),
        (
            dict(class_dict={}),
            "test split of miniImageNet has 2 classes of 4 images, but .* 0 classes of no images",
        ),
        (dict(class_dict={"a": [0, 1], "b": [2]}), "has 2 classes of 1 or 2 images. It is incomplete or of another"),
        (dict(class_dict={"a": [0], "b": [1], "c": [2]}), "has 3 classes of 1 images.*interchanged: rename"),
    ],
)
def test_bad_cache(root, changes, message):
    if isinstance(changes, list):
        content = changes
    elif "a" in changes:
        content = {"image_data": None, **changes}
    else:
        content = cache_content("test") | changes
    (root / "mini-imagenet-cache-test.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_mini_imagenet("test", root=root)


def test_interchanged_validation_and_test(root, monkeypatch):
    monkeypatch.setattr(mini_imagenet, "NUM_CLASSES", {"train": 64, "validation": 16, "test": 20})
    write_caches(root)
    with pytest.raises(
        ValueError, match="the validation split .* has 16 classes .*val.pkl has 2 classes .*interchanged"
    ):
        load_mini_imagenet("validation", root=root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "must hold a dict of data, labels, catname2label, got a dict of data, labels"),
        (
            dict(data=np.zeros(8, np.uint8)),
            r"data of .*test.pickle must be uint8 images .*, got an array of shape \(8",
        ),
        (dict(labels=["n06"] * 8), "labels of .*test.pickle must be a list of integers, got a list"),
        (dict(labels=[0, 1] * 5), "has the image 8, but data has 8 images"),
        (dict(labels=[0, 7] * 4), "catname2label of .*test.pickle has no class for the label 7"),
        (dict(labels=np.zeros(8, int)), "but .*test.pickle has 1 classes of 8 images"),
        (dict(catname2label=["n06", "n07"]), "catname2label of .* must be a dict of labels by class name, got a list"),
        (dict(catname2label={"n06": 0, "n07": 0}), "catname2label of .* gives label 0 to both 'n06' and 'n07'"),
        (dict(catname2label={0: "n06"}), "catname2label of .* must be a dict of labels by class name, has 0"),
        (dict(catname2label={"n06": "0"}), "catname2label of .* must be a dict of labels by class name, has 'n06'"),
    ],
)
def test_bad_category_split(root, changes, message):
    content = category_content("test")
    if changes is None:
        del content["catname2label"]
    else:
        content |= changes
    (root / "miniImageNet_category_split_test.pickle").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_mini_imagenet("test", root=root)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(split="val"), ValueError, "split must be one of .*, got 'val'"),
        (dict(split="train", image_size=0), ValueError, "image_size must be at least 1"),
        (dict(split="train", image_size="84"), TypeError, "image_size must be an int"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        load_mini_imagenet(**arguments)


def test_sizes_of_the_published_split():
    assert mini_imagenet.NUM_CLASSES == {"train": 64, "validation": 16, "test": 20}
    assert mini_imagenet.IMAGES_PER_CLASS == 600
