"""Enhanced multi-frame MR: where and when each frame was taken (PS3.3 C.7.6.16, C.8.13.5), one header per frame.

Enhanced MR Image Storage (A.36.2) and what PACS make of classic series, Legacy Converted Enhanced MR Image Storage
(A.71). What frames share stands in the shared functional groups or, as some scanners write it, once per frame.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from fedcmr.client.ingest.dicom.elements import Elements, Wanted, wanted
from fedcmr.client.ingest.dicom.header import Header, PixelFormat, shared_value
from fedcmr.client.ingest.dicom.pixels import rescale
from fedcmr.client.ingest.reasons import Unusable

CONVERTED = wanted("TriggerTime", "InstanceNumber", "EchoTime", "InversionTime", "ScanningSequence", "ImageType")
GROUPS = wanted(
    PlanePositionSequence=wanted("ImagePositionPatient"),
    PlaneOrientationSequence=wanted("ImageOrientationPatient"),
    PixelMeasuresSequence=wanted("PixelSpacing"),
    PixelValueTransformationSequence=wanted("RescaleSlope", "RescaleIntercept"),
    FrameContentSequence=wanted("TemporalPositionIndex"),
    CardiacSynchronizationSequence=wanted("NominalCardiacTriggerDelayTime", "ActualCardiacTriggerDelayTime"),
    MRImageFrameTypeSequence=wanted("FrameType", "ComplexImageComponent"),
    MREchoSequence=wanted("EffectiveEchoTime"),
    MRModifierSequence=wanted("InversionRecovery", "InversionTimes", "InversionTime"),
    UnassignedSharedConvertedAttributesSequence=CONVERTED,
    UnassignedPerFrameConvertedAttributesSequence=CONVERTED,
)
FRAME_ELEMENTS: Wanted = wanted(SharedFunctionalGroupsSequence=GROUPS, PerFrameFunctionalGroupsSequence=GROUPS)
"""What to keep of the functional groups."""


def frame_headers(elements: Elements, file: Header) -> list[Header]:
    """The headers of all frames.

    Args:
        elements: Elements of the file.
        file: What holds for all frames; its geometry and times are replaced.

    Raises:
        Unusable: Any frame does not say where it lies: never are only those taken that do.
    """
    form = file.pixel_format
    assert form is not None
    shared = (elements.items("SharedFunctionalGroupsSequence") or [Elements("<", [])])[0]
    per_frame = elements.items("PerFrameFunctionalGroupsSequence")
    if len(per_frame) != form.NumberOfFrames:
        raise Unusable("unplaced-frames")
    headers = [_frame(_Groups(own, shared), file, form, number) for number, own in enumerate(per_frame)]
    if len({header.InstanceNumber for header in headers}) > 1:
        return headers
    if len({header.ImagePositionPatient for header in headers}) == len(headers):
        # A file per image, or per volume: its frames have one phase, and their order says nothing of it.
        numbers = [header.InstanceNumber for header in headers]
        return [
            replace(
                header, InstanceNumber=file.InstanceNumber if math.isnan(number) else number, order=file.InstanceNumber
            )
            for header, number in zip(headers, numbers, strict=True)
        ]
    # TemporalPositionIndex is missing or the same in all frames: their order remains.
    return [replace(header, InstanceNumber=number + 1.0) for number, header in enumerate(headers)]


class _Groups:
    """The functional groups of one frame."""

    def __init__(self, own: Elements, shared: Elements) -> None:
        self.own, self.shared = own, shared

    def holding(self, sequence: str, *keywords: str) -> Iterator[tuple[Elements, str]]:
        """Where one of the elements has a value, the frame's own group before the shared one."""
        for keyword in keywords:
            for groups in (self.own, self.shared):
                for item in groups.items(sequence)[:1]:
                    if item.has(keyword):
                        yield item, keyword

    def numbers(self, sequence: str, keyword: str, count: int) -> tuple[float, ...]:
        """An element that a frame cannot do without."""
        for item, _ in self.holding(sequence, keyword):
            numbers = item.numbers(keyword, count)
            if numbers is not None:
                return numbers
            break
        raise Unusable("unplaced-frames")

    def number(self, sequence: str, *keywords: str) -> float:
        """The first of the elements that has a value; NaN without."""
        return next((item.number(word) for item, word in self.holding(sequence, *keywords)), math.nan)

    def codes(self, sequence: str, keyword: str) -> tuple[str, ...]:
        """An element of codes; empty without."""
        return next((item.codes(word) for item, word in self.holding(sequence, keyword)), ())

    def converted(self, keyword: str) -> Elements:
        """What a converter found in the classic images and had no group for."""
        sequences = ("UnassignedPerFrameConvertedAttributesSequence", "UnassignedSharedConvertedAttributesSequence")
        return next((item for name in sequences for item, _ in self.holding(name, keyword)), Elements("<", []))


def _frame(groups: _Groups, file: Header, form: PixelFormat, number: int) -> Header:
    """The header of one frame."""
    delay = groups.number(
        "CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime", "ActualCardiacTriggerDelayTime"
    )
    position = groups.number("FrameContentSequence", "TemporalPositionIndex")
    echo = groups.number("MREchoSequence", "EffectiveEchoTime")
    inversion = groups.number("MRModifierSequence", "InversionTimes", "InversionTime")
    recovery = groups.codes("MRModifierSequence", "InversionRecovery") == ("YES",)
    kind = groups.codes("MRImageFrameTypeSequence", "FrameType") or groups.converted("ImageType").codes("ImageType")
    component = groups.codes("MRImageFrameTypeSequence", "ComplexImageComponent")
    own_rescale = next(
        (rescale(item) for item, _ in groups.holding("PixelValueTransformationSequence", "RescaleSlope")), None
    )
    if own_rescale is not None:
        form = form._replace(RescaleSlope=own_rescale[0], RescaleIntercept=own_rescale[1])

    def known(value: float, keyword: str) -> float:
        return groups.converted(keyword).number(keyword) if math.isnan(value) else value

    return replace(
        file,
        ImagePositionPatient=groups.numbers("PlanePositionSequence", "ImagePositionPatient", 3),
        ImageOrientationPatient=shared_value(groups.numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)),
        PixelSpacing=shared_value(groups.numbers("PixelMeasuresSequence", "PixelSpacing", 2)),
        TriggerTime=known(delay, "TriggerTime"),
        InstanceNumber=known(position, "InstanceNumber"),
        frame=number,
        ImageType=shared_value((kind or file.ImageType) + component),
        ScanningSequence=("IR",) if recovery else groups.converted("ScanningSequence").codes("ScanningSequence"),
        EchoTime=known(echo, "EchoTime"),
        InversionTime=known(inversion, "InversionTime"),
        pixel_format=shared_value(form),
    )
