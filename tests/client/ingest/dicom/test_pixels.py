"""Pixels: the same image stored in every way is the same array, and what cannot be read has a reason."""

import base64
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    MPEG2MPML,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from fedcmr.client.ingest.dicom import pixels as pixels_module
from fedcmr.client.ingest.dicom.pixels import read_pixels
from fedcmr.client.ingest.dicom.reader import find_dicom, read_file
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers
from tests.client.ingest.dicom_files import compress, image_dataset, write_image, write_study

REAL = Path(__file__).resolve().parents[4].parent / "shared" / "real" / "dicom" / "multivendor"
ROWS, COLUMNS = 32, 40
HTJ2K_STREAM = (
    "|4;u>04YEK0000e0000W00000000000000e0000W0000000000009pH0sl|{2mk^A000XAQUDA90ssL31q1{@0smY86Cj9?kdTm&kdTm&kdTmw"
    "h=~7W02crOPjF>!N>E53R%LP^FfKASE;BCwkN^q*00003KmY;%lfVEf05klL>j6SE0KfnfKmZfK01|+9{Q`${06>!P0)cb@(gBBb0KfnhPyhvN"
    "00B~IYLfQt_W^>m02lzOK%W--009BLmH;vo!O$lFqm%%^02fIB09!Bs1+JgZ&rcxwCD3dUhCP4!^yyQRgutLA4xQZdAMx5aUO)h`x&S7E8;IdS"
    "g=&JUJ9Tv9@quR)5-"
    "uQoLz)1bNMIoIG^U`)MTF!jV*G*5gfM)fm;k^47qvhD7kdBzU3lj_&pGFubB<M5*QuQN2`3<m=sC}G&N(NXaKZ^DWDN#z5+^tTqEUa&^PF?e37"
    "mijoQ6%DoU2&D2`3;@**VX1&N(NX@TqYpejzV#0uJyYC{d9BB#Iug;vwrUBuA{dLd6LNBr&xCKk$)1{_(?y10LarKR&<_9x)#5yTQI2j5y!}QW"
    "A+odK3JTc0<gD)`I@#gB5@vwTM7_EWo1ZLA=9~0snB1fAEJ7e)Iz$`Qh<{?|<Ww5B$G>zJ9#H2mItO=YTP<ejFnD2&EJBk%q7VzyL4Or~n1&Fa"
    "Qgn$xM<YNs=T<k|aq2BtQZrK$0X#01#j@lO#!!BuSDa36KEvK_3ZD9|@2ENs=G|K!C|ik|arzBuSDaKmyP|{U<;IBtQZrNrD6b0VXp^k|arzBu"
    "SD02|&LIlz;>zAOT5|Kmq^*oXjLik|arzBuN4!NCG5C0wh2JBtViRKmzn*KPNLuk|arzBnc8ENI>88pCAd4011!)36LZSkO2MM&&f=ZBuSDaNd"
    "gj(fCSK=ehElGk|aq2&__S_V=|K@Ns=T<l7IvxAOQ)K011!)Ns^F|kU$^w4{!kU0Elg9#=l;_S$yq&v}0edU#z}%up?iuU#z-"
    "L*9Us_`t|zD*=vNodi{F+W%IRx>(}eo>o1+ICF|Gg*Xu4JSj80^F|!*nx&;3JYd`+~cmF^5@Be@QeaC;02!bF8f*=SIBuJ1TL4t&Y1SI_a`kL5"
    "*DV3BU-og+)`v^exS%G8%z%v0EWCbAr{y4(}cyt2(`~QFb|9}5~-~W96`x@C`3=1$^1p>?pU>v0b_;dmP*#"
)
"""`image_of(12, 0)` as OpenJPH writes it; no encoder of HTJ2K is among the project's dependencies."""


def image_of(bits: int, signed: int) -> np.ndarray:
    """Every kind of bit pattern of so many bits; int32, shape (ROWS, COLUMNS)."""
    rows, columns = np.mgrid[:ROWS, :COLUMNS]
    return (rows * 37 + columns * columns * 5) % 2**bits - signed * 2 ** (bits - 1)


def stored(path: Path, bits: int, signed: int, **elements) -> Path:
    """The image as 16-bit cells, uncompressed."""
    write_image(
        path,
        image_of(bits, signed),
        **{"BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": signed, **elements},
    )
    return path


def read(path: Path) -> np.ndarray:
    (header,) = read_file(path)
    return read_pixels(header)


def code(path: Path) -> str:
    """Why a file gives no pixels; in a child, for some make a decoder crash."""
    with Workers() as workers:
        (result,) = workers.map(read, [path])
    assert isinstance(result, Unusable), "it was read"
    return result.code


def encoded(path: Path, target: Path, way: str) -> Path:
    """A file's image in another transfer syntax: a name of GDCM's, or one that pydicom writes."""
    if not way.startswith("1."):
        compress(path, target, way)
        return target
    dataset = pydicom.dcmread(path)
    if way in (ImplicitVRLittleEndian, ExplicitVRBigEndian):
        if way == ExplicitVRBigEndian:
            dataset.PixelData = dataset.pixel_array.byteswap().tobytes()
        list(dataset)  # converts every element: pydicom would write the numbers as they are in the file
        dataset.file_meta.TransferSyntaxUID = way
        pydicom.dcmwrite(target, dataset, enforce_file_format=True)
    else:
        dataset.compress(way, generate_instance_uid=False)
        dataset.save_as(target)
    return target


WAYS = [
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    RLELossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    JPEG2000Lossless,
    "JPEGLosslessProcess14",
    "JPEGLosslessProcess14_1",
    "JPEGLSLossless",
    "JPEG2000Lossless",
    "RLELossless",
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("bits", "signed"), [(12, 0), (16, 0), (16, 1), (8, 0), (12, 1)])
def test_every_transfer_syntax_gives_the_same_array(tmp_path, way, bits, signed):
    plain = stored(tmp_path / "plain", bits, signed)
    if way == JPEGLSNearLossless:
        way = JPEGLSLossless if signed else way  # pydicom writes no signed near-lossless images
    if (way, bits) == (RLELossless, 8):
        way = "RLELossless"  # pydicom writes half of 8 bits in 16
    path = encoded(plain, tmp_path / "other", way)
    assert np.array_equal(read(plain), image_of(bits, signed))
    assert np.array_equal(read(path), image_of(bits, signed))
    name = pydicom.dcmread(path).file_meta.TransferSyntaxUID
    assert name != pydicom.dcmread(plain).file_meta.TransferSyntaxUID


def test_high_throughput_jpeg_2000_gives_the_same_array(tmp_path):
    dataset = image_dataset(image_of(12, 0), BitsStored=12, HighBit=11, PixelRepresentation=0)
    dataset.PixelData = pydicom.encaps.encapsulate([base64.b85decode(HTJ2K_STREAM)])
    dataset["PixelData"].VR = "OB"
    for syntax in (HTJ2KLossless, "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203"):
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(tmp_path / "ht", enforce_file_format=True)
        assert np.array_equal(read(tmp_path / "ht"), image_of(12, 0))


def test_one_frame_may_lie_in_several_fragments(tmp_path):
    path = encoded(stored(tmp_path / "plain", 12, 0), tmp_path / "jpeg", JPEG2000Lossless)
    dataset = pydicom.dcmread(path)
    stream = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    dataset.PixelData = pydicom.encaps.encapsulate([stream], fragments_per_frame=3, has_bot=False)
    dataset.save_as(path)
    assert np.array_equal(read(path), image_of(12, 0))


@pytest.mark.parametrize("missing", [RLELossless, JPEGLossless, JPEGLSLossless, JPEG2000Lossless])
def test_a_missing_plug_in_is_a_reason(tmp_path, monkeypatch, missing):
    way = {JPEGLossless: "JPEGLosslessProcess14"}.get(missing, missing)
    path = encoded(stored(tmp_path / "plain", 12, 0), tmp_path / "other", way)
    monkeypatch.setattr(pixels_module, "DECODERS", {})
    pixels_module._can_decode.cache_clear()
    with pytest.raises(Unusable, match="no-decoder"):
        read(path)
    pixels_module._can_decode.cache_clear()


def test_a_film_is_no_image(tmp_path):
    dataset = image_dataset(image_of(12, 0), transfer_syntax=MPEG2MPML)
    dataset.PixelData = pydicom.encaps.encapsulate([bytes(100)])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(tmp_path / "film", enforce_file_format=True)
    assert code(tmp_path / "film") == "no-decoder"


@pytest.mark.parametrize("way", [RLELossless, JPEGLSLossless, JPEG2000Lossless, "JPEGLosslessProcess14"])
def test_a_damaged_stream_is_a_reason(tmp_path, way):
    path = encoded(stored(tmp_path / "plain", 12, 0), tmp_path / "other", way)
    whole = path.read_bytes()
    dataset = pydicom.dcmread(path)
    rng = np.random.default_rng(0)
    dataset.PixelData = pydicom.encaps.encapsulate([rng.bytes(400)])
    dataset.save_as(path)
    assert code(path) in ("unreadable-pixels", "parser-crashed", "too-large")
    path.write_bytes(whole[:-100])
    assert code(path) == "unreadable-pixels"
    # A stream of another size than the header says.
    (path.parent / "other size").write_bytes(
        whole.replace(b"\x28\x00\x10\x00US\x02\x00\x20", b"\x28\x00\x10\x00US\x02\x00\x21")
    )
    assert code(path.parent / "other size") in ("unreadable-pixels", "parser-crashed")


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"RescaleSlope": "2", "RescaleIntercept": "-1024"}, lambda x: 2.0 * x - 1024),
        ({"RescaleSlope": "0.5"}, lambda x: x / 2),
        ({"RescaleIntercept": "-7"}, lambda x: x - 7.0),
        ({"RescaleSlope": "", "RescaleIntercept": ""}, lambda x: x),
        ({"PhotometricInterpretation": "MONOCHROME1"}, lambda x: -1.0 * x),
        ({"PhotometricInterpretation": "MONOCHROME1", "RescaleSlope": "3"}, lambda x: -3.0 * x),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_values_are_rescaled_and_white_is_bright(tmp_path, elements, expected):
    assert np.array_equal(read(stored(tmp_path / "a", 12, 1, **elements)), expected(image_of(12, 1)))


@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("high_bit", [11, 13, 15])
def test_bits_beyond_the_stored_ones_are_not_the_images(tmp_path, signed, high_bit):
    cells = (image_of(12, signed) & 0xFFF) << (high_bit - 11)
    inside = 0xFFF << (high_bit - 11)
    junk = np.random.default_rng(1).integers(0, 2**16, cells.shape) & ~inside
    path = tmp_path / "a"
    write_image(
        path,
        cells,
        BitsStored=12,
        HighBit=high_bit,
        PixelRepresentation=signed,
        PixelData=(cells | junk).astype("<u2").tobytes(),
    )
    assert np.array_equal(read(path), image_of(12, signed))


def test_eight_bits_and_thirty_two(tmp_path):
    write_image(
        tmp_path / "8",
        image_of(8, 0),
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelRepresentation=0,
        PixelData=image_of(8, 0).astype("u1").tobytes(),
    )
    assert np.array_equal(read(tmp_path / "8"), image_of(8, 0))
    write_image(
        tmp_path / "32",
        image_of(20, 1),
        BitsAllocated=32,
        BitsStored=32,
        HighBit=31,
        PixelRepresentation=1,
        PixelData=image_of(20, 1).astype("<i4").tobytes(),
    )
    assert np.array_equal(read(tmp_path / "32"), image_of(20, 1))


def test_elements_that_follow_from_others_may_be_missing(tmp_path):
    assert np.array_equal(
        read(stored(tmp_path / "a", 16, 1, HighBit=None, SamplesPerPixel=None, BitsStored=None)), image_of(16, 1)
    )


PLAIN = image_of(12, 0).astype("<u2").tobytes()


@pytest.mark.parametrize(
    ("reason", "elements"),
    [
        ("unreadable-pixels", {"RescaleSlope": "0"}),
        ("unreadable-pixels", {"PixelData": PLAIN[:-2]}),
        ("unreadable-pixels", {"PixelData": PLAIN * 2}),
        ("unreadable-pixels", {"PixelData": PLAIN * 31}),  # pydicom reads it as 31 frames
        ("unreadable-pixels", {"PixelData": b""}),
        ("unreadable-pixels", {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}),
        ("unreadable-pixels", {"BitsAllocated": 12}),
        ("unreadable-pixels", {"BitsStored": 17}),
        ("unreadable-pixels", {"BitsStored": 0}),
        ("unreadable-pixels", {"HighBit": 3}),
        ("unreadable-pixels", {"PixelRepresentation": 2}),
        ("unreadable-pixels", {"PixelRepresentation": None}),
        ("unreadable-pixels", {"PhotometricInterpretation": None}),
        ("not-grayscale", {"PhotometricInterpretation": "PALETTE COLOR"}),
        ("not-grayscale", {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PixelData": PLAIN * 3}),
        ("unplaced-frames", {"NumberOfFrames": 2, "PixelData": PLAIN * 2}),
        ("unreadable-pixels", {"NumberOfFrames": -1}),
        ("too-large", {"NumberOfFrames": 20_000}),
        ("no-geometry", {"Rows": 0}),
        ("no-geometry", {"Columns": None}),
        ("too-large", {"Rows": 65535, "Columns": 65535}),
    ],
    ids=str,
)
def test_pixels_that_cannot_be_right_are_refused(tmp_path, reason, elements):
    assert code(stored(tmp_path / "a", 12, 0, **elements)) == reason


@pytest.mark.parametrize("slope", [b"nan ", b"1e400 ", b"-inf", b"abcd", b"1_00"])
def test_a_slope_that_is_no_number_is_refused(tmp_path, slope):
    # Written over a good one: pydicom does not write it, but reads some of them.
    path = stored(tmp_path / "a", 12, 0, RescaleSlope="7" * len(slope.rstrip()), RescaleIntercept="0")
    raw = path.read_bytes()
    padded = b"7" * len(slope.rstrip()) + b" " * (len(slope.rstrip()) % 2)
    assert raw.count(padded) == 1
    path.write_bytes(raw.replace(padded, slope.rstrip().ljust(len(padded))))
    assert code(path) == "unreadable-pixels"


def test_a_compressed_study_is_the_same_case(tmp_path):
    write_study(tmp_path / "plain", masks=False)
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        target = tmp_path / "compressed" / path.name
        target.parent.mkdir(exist_ok=True)
        encoded(path, target, WAYS[number % len(WAYS)])
    plain, compressed = (find_dicom(tmp_path / name).studies[0].read() for name in ("plain", "compressed"))
    assert np.array_equal(plain.images, compressed.images)


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real scans in {REAL}")
def test_real_files_of_several_vendors_are_decoded_or_refused_with_the_right_code():
    shapes, arrays = {}, {}
    for path in sorted(path for path in REAL.rglob("*") if path.is_file()):
        folder = str(path.parent.relative_to(REAL))
        if folder == ".":
            with pytest.raises(Unusable, match="not-dicom"):
                read_file(path)  # a licence
            continue
        headers = read_file(path)
        images = np.stack([read_pixels(header) for header in headers])
        shapes[folder] = images.shape
        arrays[folder, path.name] = images
        reference = pydicom.dcmread(path)
        expected = reference.pixel_array.reshape(images.shape).astype(np.float32)
        for header, image in zip(headers, expected, strict=True):
            shared = reference.get("SharedFunctionalGroupsSequence", [reference])[0]
            own = shared if header.frame is None else reference.PerFrameFunctionalGroupsSequence[header.frame]
            scale = next(
                (
                    group.PixelValueTransformationSequence[0]
                    for group in (own, shared)
                    if "PixelValueTransformationSequence" in group
                ),
                own,
            )
            image *= np.float32(scale.get("RescaleSlope", 1))
            image += np.float32(scale.get("RescaleIntercept", 0))
        assert np.array_equal(images, expected)
    assert len(shapes) == 16
    assert shapes["philips_enhanced/fmri/001"] == (32, 64, 64)
    assert shapes["hyperfine/anatomical/001"] == (8, 138, 112)
    assert shapes["siemens_multiframe/anatomical/001"] == (8, 256, 256)
    # The same images, stored several ways.
    for folder, *others in (
        [
            f"generic/{name}/001"
            for name in ("compressed", "compressed_j2k", "compressed_jpeg", "compressed_jpegls", "compressed_rle")
        ],
        ["hitachi/anatomical/001", "hitachi/anatomical/001_implicit"],
    ):
        first = [array for (name, _), array in sorted(arrays.items()) if name == folder]
        for other in others:
            again = [array for (name, _), array in sorted(arrays.items()) if name == other]
            assert len(first) == len(again) >= 1
            assert all(map(np.array_equal, first, again))
