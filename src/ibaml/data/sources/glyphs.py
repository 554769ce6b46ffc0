"""Characters of several scripts rendered from the fonts that matplotlib ships: few-shot images without a download.

The faces play the part that the writers play in Omniglot. No script occurs in two splits, and a character that looks
like one of an earlier split (Greek capital Alpha, Armenian Oh) is left out of the later one.
"""

import dataclasses
import importlib.metadata
import math
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch

from ibaml.checks import require_positive_int
from ibaml.data.files.cache import read_class_images, write_class_images
from ibaml.data.files.locate import cache_folders
from ibaml.data.images import ClassImages
from ibaml.data.sources.base import ImageSource, Split

if TYPE_CHECKING:
    from PIL import ImageFont

SCRIPTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "LATIN",
        "CYRILLIC",
        "HEBREW",
        "ARABIC",
        "CANADIAN SYLLABICS",
        "LISU",
        "LAO",
        "OLD ITALIC",
    ),
    "validation": ("GREEK",),
    "test": ("GEORGIAN", "ARMENIAN"),
}
"""Scripts of each split, as the first words of their characters' Unicode names."""

IMAGES_PER_CLASS = 20
"""As many as Omniglot has: enough for 5 shots and 15 queries."""

MIN_FACES = 4
"""Characters that fewer faces contain are left out: too little differs between their images but the variations."""

MAX_SIMILARITY = 0.85
"""Two characters whose images correlate more than this, averaged over their common faces, count as one class."""

MAX_SIMILARITY_ACROSS_SPLITS = 0.80
"""The same for characters of different splits: stricter, since a class known from training would flatter a result."""

MAX_SIMILARITY_IN_ONE_FACE = 0.97
"""So do two characters that correlate more than this in any one face (Cyrillic Te and Latin m, in italics)."""

_COMPARED_SIZE = 28
"""Image size at which characters are compared, whatever size is asked for, so that the classes are always the same."""

_RENDERING_VERSION = 1
_SEED = 20230615

INK_SHARE = 19 / 28
"""Share of the image that the longer side of the ink fills before variations (MNIST: 20 of 28 pixels)."""

# Variations are drawn uniformly between minus and plus these; they rarely push ink out of the image.
_MAX_ROTATION = math.radians(15)
_MAX_SHEAR = 0.2
_MAX_LOG_SCALE = 0.15
_MAX_SHIFT = 1.5 / 28

_FACES = tuple(
    f"{family}{style}.ttf"
    for family, styles in (
        ("DejaVuSans", ("", "-Bold", "-Oblique", "-BoldOblique")),
        ("DejaVuSansMono", ("", "-Bold", "-Oblique", "-BoldOblique")),
        ("DejaVuSerif", ("", "-Bold", "-Italic", "-BoldItalic")),
        ("STIXGeneral", ("", "Bol", "Italic", "BolIta")),
    )
    for style in styles
)
"""The first is the face that every character must be in, so that any two characters can be compared in one face."""

Bitmap: TypeAlias = npt.NDArray[np.uint8]


class _Character(NamedTuple):
    """A character to render: its code point, its split and the faces (indices into _FACES) that contain it."""

    code_point: int
    split: Split
    faces: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glyphs(ImageSource):
    """Characters rendered from fonts, which need no download, light on dark; no script occurs in two splits."""

    name: ClassVar[str] = "glyphs"
    num_channels: ClassVar[int] = 1

    def images(self, split: Split, *, data: Path | None = None) -> ClassImages:
        """Renders the characters of a split, or takes them from the cache; ``data`` is not needed."""
        return load_glyphs(split, image_size=self.image_size)


def load_glyphs(split: Split, *, image_size: int = 28, cache_dir: str | os.PathLike[str] | None = None) -> ClassImages:
    """Loads the characters of one split, 20 images each, white ink (255) on black.

    Every image is one of the faces' renderings, scaled so that the longer side of its ink fills two thirds of the
    image, centred, and then turned (up to 15 degrees), sheared (0.2), scaled (15%) and shifted (1.5 pixels of 28), by
    amounts that depend on the character alone. Upper and lower case that differ only in size are one class.
    Rendered once, in a few seconds, then cached.

    A character turned by 90 degrees may look like one of another script (Latin u, Armenian Vo): use ``with_rotations``
    on training classes only if that does not matter.

    Args:
        split: ``"train"`` (Latin, Cyrillic and others), ``"validation"`` (Greek) or ``"test"`` (Georgian, Armenian).
        image_size: Height and width in pixels, at least 8.
        cache_dir: Folder of the cache; None means ``$IBAML_DATA``, or else the per-user cache.

    Returns:
        Grey images of shape ``[num_classes * 20, 1, image_size, image_size]``, one class a character, named like
        ``"U+0041 LATIN CAPITAL LETTER A"`` and sorted by code point.

    Raises:
        TypeError: If ``image_size`` is not an int.
        ValueError: If ``split`` is none of the three or ``image_size`` below 8.
        FileNotFoundError: If the installed matplotlib comes without its fonts.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}.")
    if require_positive_int("image_size", image_size) < 8:
        raise ValueError(f"image_size must be at least 8 for a character to be readable, got {image_size}.")
    folders = cache_folders(cache_dir)
    if (cached := read_class_images(folders, _cache_name(split, image_size))) is not None:
        return cached
    rendered = render_glyphs(image_size)
    for name, images in rendered.items():
        if write_class_images(folders, _cache_name(name, image_size), images) is None:
            break
    return rendered[split]


def render_glyphs(image_size: int) -> dict[Split, ClassImages]:
    """Renders all three splits, which have to be made together because no two of their classes may look alike.

    Args:
        image_size: Height and width in pixels.

    Returns:
        The classes of each split.

    Raises:
        FileNotFoundError: If the installed matplotlib comes without its fonts.
    """
    fonts, charmaps = _open_faces(_COMPARED_SIZE)
    candidates = _list_characters(charmaps)
    renderings = [_render_faces(character, fonts) for character in candidates]
    drawn = np.zeros((len(candidates), len(_FACES)), dtype=np.bool_)
    plain = np.zeros((len(candidates), len(_FACES), _COMPARED_SIZE, _COMPARED_SIZE), dtype=np.uint8)
    for row, by_face in enumerate(renderings):
        for face, bitmap in by_face.items():
            drawn[row, face] = True
            plain[row, face] = _place(bitmap, _COMPARED_SIZE, np.eye(2), np.zeros(2))
    splits = np.array([character.split for character in candidates])
    kept = [row for row in _choose_distinct(plain, drawn, splits) if len(renderings[row]) >= MIN_FACES]
    if image_size != _COMPARED_SIZE:
        fonts, _ = _open_faces(image_size)
        renderings = [_render_faces(character, fonts) for character in candidates]

    images: dict[Split, ClassImages] = {}
    for split in get_args(Split):
        rows = [row for row in kept if candidates[row].split == split]
        pictures = np.concatenate([_vary(candidates[row], renderings[row], image_size) for row in rows])
        images[split] = ClassImages(
            images=torch.from_numpy(pictures).unsqueeze(1),
            class_start=torch.arange(len(rows) + 1) * IMAGES_PER_CLASS,
            class_names=tuple(_class_name(candidates[row].code_point) for row in rows),
        )
    return images


def _class_name(code_point: int) -> str:
    """Names a class as the Unicode charts do."""
    return f"U+{code_point:04X} {unicodedata.name(chr(code_point))}"


def _cache_name(split: Split, image_size: int) -> str:
    """Names the cache file after all that its contents depend on."""
    fonts = f"matplotlib{importlib.metadata.version('matplotlib')}"
    renderer = f"pillow{importlib.metadata.version('pillow')}"
    return f"glyphs-v{_RENDERING_VERSION}-{fonts}-{renderer}-{image_size}-{split}.npz"


def _open_faces(image_size: int) -> tuple[list["ImageFont.FreeTypeFont"], list[dict[int, int]]]:
    """Opens every face at a size whose ink is larger than in the final image, with its map of code point to glyph."""
    # Imported here because a cached split needs neither, and matplotlib takes long to import.
    import matplotlib
    from matplotlib.ft2font import FT2Font
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts: list["ImageFont.FreeTypeFont"] = []
    charmaps: list[dict[int, int]] = []
    for face in _FACES:
        path = folder / face
        if not path.is_file():
            raise FileNotFoundError(f"the font {face} is not in {folder}; reinstall matplotlib from its wheel on PyPI.")
        # BASIC: no shaping, which would join Arabic letters and needs a library that not every Pillow has.
        fonts.append(ImageFont.truetype(str(path), size=3 * image_size, layout_engine=ImageFont.Layout.BASIC))
        charmaps.append({int(code): int(glyph) for code, glyph in FT2Font(str(path)).get_charmap().items()})
    return fonts, charmaps


def _list_characters(charmaps: Sequence[dict[int, int]]) -> list[_Character]:
    """Lists the letters of all scripts that enough faces contain, splits in their order, then by code point."""
    characters: list[_Character] = []
    for split in get_args(Split):
        for code_point in sorted(charmaps[0]):
            character = chr(code_point)
            # Lm and Mn (modifier letters, accents) are small copies of letters and marks without a shape of their own.
            if unicodedata.category(character) not in ("Lu", "Ll", "Lt", "Lo"):
                continue
            if not unicodedata.name(character, "").startswith(SCRIPTS[split]):
                continue
            # A canonical decomposition means a letter with accents, too like its neighbours at this size. (One that
            # starts with "<" is a compatibility form, such as an Arabic letter in its initial shape.)
            if (decomposition := unicodedata.decomposition(character)) and not decomposition.startswith("<"):
                continue
            # Glyph 0 is the box that stands for a missing character.
            faces = tuple(face for face, charmap in enumerate(charmaps) if charmap.get(code_point, 0) != 0)
            if len(faces) >= MIN_FACES:
                characters.append(_Character(code_point, split, faces))
    return characters


def _render_faces(character: _Character, fonts: Sequence["ImageFont.FreeTypeFont"]) -> dict[int, Bitmap]:
    """Returns the ink of the character in each of its faces, cropped to the ink; blank ones are left out."""
    from PIL import Image, ImageDraw

    bitmaps: dict[int, Bitmap] = {}
    text = chr(character.code_point)
    for face in character.faces:
        left, top, right, bottom = (int(edge) for edge in fonts[face].getbbox(text))
        canvas = Image.new("L", (max(1, right - left), max(1, bottom - top)))
        ImageDraw.Draw(canvas).text((-left, -top), text, fill=255, font=fonts[face])
        if (ink := canvas.getbbox()) is not None:
            bitmaps[face] = np.asarray(canvas.crop(ink))
    return bitmaps


def _place(bitmap: Bitmap, image_size: int, matrix: npt.NDArray[np.float64], shift: npt.NDArray[np.float64]) -> Bitmap:
    """Scales a bitmap to the common size, applies a linear map about its centre and puts it into an image.

    Args:
        bitmap: Ink cropped to its bounding box.
        image_size: Height and width of the result.
        matrix: 2 x 2 linear map of (x, y), the identity for none.
        shift: Displacement of the centre (x, y) as a fraction of the image.

    Returns:
        uint8, shape ``[image_size, image_size]``.
    """
    from PIL import Image, ImageOps

    # Drawn twice as large and averaged over 2 x 2 pixels: bilinear sampling alone would skip thin strokes.
    canvas_size = 2 * image_size
    height, width = bitmap.shape
    inverse = np.linalg.inv(matrix) * (max(height, width) / (INK_SHARE * canvas_size))
    # A margin lets bilinear sampling fade to black at the edge of the ink instead of cutting it off.
    margin = 2
    source = ImageOps.expand(Image.fromarray(bitmap), border=margin)
    # Pillow wants the map from canvas to source coordinates.
    offset = np.array([width / 2 + margin, height / 2 + margin]) - inverse @ (canvas_size * (0.5 + shift))
    coefficients = (*inverse[0].tolist(), float(offset[0]), *inverse[1].tolist(), float(offset[1]))
    drawn = source.transform(
        (canvas_size, canvas_size), Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BILINEAR
    )
    return np.asarray(drawn.reduce(2))


def _vary(character: _Character, bitmaps: dict[int, Bitmap], image_size: int) -> Bitmap:
    """Returns the images of one class: its faces in turn, each image with its own small affine map."""
    # Seeded by the character, so that its images do not depend on which other characters are kept.
    random = np.random.default_rng([_SEED, character.code_point])
    faces = random.permutation(sorted(bitmaps))
    images = np.empty((IMAGES_PER_CLASS, image_size, image_size), dtype=np.uint8)
    for index in range(IMAGES_PER_CLASS):
        angle = random.uniform(-_MAX_ROTATION, _MAX_ROTATION)
        shear = random.uniform(-_MAX_SHEAR, _MAX_SHEAR)
        scale_x, scale_y = np.exp(random.uniform(-_MAX_LOG_SCALE, _MAX_LOG_SCALE, size=2))
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        matrix = rotation @ np.array([[scale_x, shear], [0.0, scale_y]])
        shift = random.uniform(-_MAX_SHIFT, _MAX_SHIFT, size=2)
        images[index] = _place(bitmaps[int(faces[index % len(faces)])], image_size, matrix, shift)
    return images


def _choose_distinct(plain: Bitmap, drawn: npt.NDArray[np.bool_], splits: npt.NDArray[np.str_]) -> list[int]:
    """Chooses characters no two of which look alike; of two that do, the earlier stays.

    The likeness of two characters is the correlation of their images in one face, averaged over the faces that contain
    both, and its largest value: the face is the same, so what differs is the character.

    Args:
        plain: Images without variations, shape ``[num_characters, num_faces, size, size]``.
        drawn: Whether a character has an image in a face, shape ``[num_characters, num_faces]``.
        splits: Split of each character, shape ``[num_characters]``.

    Returns:
        Indices of the kept characters, ascending.
    """
    num_characters, num_faces = drawn.shape
    likeness = np.zeros((num_characters, num_characters), dtype=np.float32)
    highest = np.zeros_like(likeness)
    for face in range(num_faces):
        rows = np.flatnonzero(drawn[:, face])
        vectors = plain[rows, face].reshape(len(rows), plain[0, 0].size).astype(np.float32)
        vectors -= vectors.mean(axis=1, keepdims=True)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-6)
        correlation = vectors @ vectors.T
        likeness[np.ix_(rows, rows)] += correlation
        highest[np.ix_(rows, rows)] = np.maximum(highest[np.ix_(rows, rows)], correlation)
    counts = drawn.astype(np.float32)
    likeness /= (counts @ counts.T).clip(min=1)
    same_split = splits[:, None] == splits[None, :]
    limit = np.where(same_split, MAX_SIMILARITY, MAX_SIMILARITY_ACROSS_SPLITS)
    alike = (likeness > limit) | (highest > MAX_SIMILARITY_IN_ONE_FACE)
    kept: list[int] = []
    for row in range(num_characters):
        if not alike[row, kept].any():
            kept.append(row)
    return kept
