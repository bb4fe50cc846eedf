from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Selection(_message.Message):
    __slots__ = ("vendors", "min_ef", "max_ef")
    VENDORS_FIELD_NUMBER: _ClassVar[int]
    MIN_EF_FIELD_NUMBER: _ClassVar[int]
    MAX_EF_FIELD_NUMBER: _ClassVar[int]
    vendors: _containers.RepeatedScalarFieldContainer[str]
    min_ef: float
    max_ef: float
    def __init__(self, vendors: _Optional[_Iterable[str]] = ..., min_ef: _Optional[float] = ..., max_ef: _Optional[float] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("selection",)
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    selection: Selection
    def __init__(self, selection: _Optional[_Union[Selection, _Mapping]] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("protocol", "study", "release_sha256", "vendors", "datasheet", "privacy", "matching_cases", "matching_bytes", "max_on_demand", "generator_sha256")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    STUDY_FIELD_NUMBER: _ClassVar[int]
    RELEASE_SHA256_FIELD_NUMBER: _ClassVar[int]
    VENDORS_FIELD_NUMBER: _ClassVar[int]
    DATASHEET_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    MATCHING_CASES_FIELD_NUMBER: _ClassVar[int]
    MATCHING_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ON_DEMAND_FIELD_NUMBER: _ClassVar[int]
    GENERATOR_SHA256_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    study: str
    release_sha256: str
    vendors: _containers.RepeatedCompositeFieldContainer[VendorCount]
    datasheet: str
    privacy: str
    matching_cases: int
    matching_bytes: int
    max_on_demand: int
    generator_sha256: str
    def __init__(self, protocol: _Optional[int] = ..., study: _Optional[str] = ..., release_sha256: _Optional[str] = ..., vendors: _Optional[_Iterable[_Union[VendorCount, _Mapping]]] = ..., datasheet: _Optional[str] = ..., privacy: _Optional[str] = ..., matching_cases: _Optional[int] = ..., matching_bytes: _Optional[int] = ..., max_on_demand: _Optional[int] = ..., generator_sha256: _Optional[str] = ...) -> None: ...

class VendorCount(_message.Message):
    __slots__ = ("vendor", "cases")
    VENDOR_FIELD_NUMBER: _ClassVar[int]
    CASES_FIELD_NUMBER: _ClassVar[int]
    vendor: str
    cases: int
    def __init__(self, vendor: _Optional[str] = ..., cases: _Optional[int] = ...) -> None: ...

class StreamRequest(_message.Message):
    __slots__ = ("release_sha256", "selection", "after")
    RELEASE_SHA256_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    release_sha256: str
    selection: Selection
    after: str
    def __init__(self, release_sha256: _Optional[str] = ..., selection: _Optional[_Union[Selection, _Mapping]] = ..., after: _Optional[str] = ...) -> None: ...

class SampleRequest(_message.Message):
    __slots__ = ("generator_sha256", "selection", "seed", "count", "after")
    GENERATOR_SHA256_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    generator_sha256: str
    selection: Selection
    seed: int
    count: int
    after: str
    def __init__(self, generator_sha256: _Optional[str] = ..., selection: _Optional[_Union[Selection, _Mapping]] = ..., seed: _Optional[int] = ..., count: _Optional[int] = ..., after: _Optional[str] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: CaseHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[CaseHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class CaseHeader(_message.Message):
    __slots__ = ("row", "size", "sha256")
    ROW_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    row: CaseRow
    size: int
    sha256: str
    def __init__(self, row: _Optional[_Union[CaseRow, _Mapping]] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class CaseRow(_message.Message):
    __slots__ = ("pseudonym", "vendor", "field_strength_t", "ef", "group", "sex", "pathology")
    PSEUDONYM_FIELD_NUMBER: _ClassVar[int]
    VENDOR_FIELD_NUMBER: _ClassVar[int]
    FIELD_STRENGTH_T_FIELD_NUMBER: _ClassVar[int]
    EF_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SEX_FIELD_NUMBER: _ClassVar[int]
    PATHOLOGY_FIELD_NUMBER: _ClassVar[int]
    pseudonym: str
    vendor: str
    field_strength_t: float
    ef: float
    group: str
    sex: str
    pathology: str
    def __init__(self, pseudonym: _Optional[str] = ..., vendor: _Optional[str] = ..., field_strength_t: _Optional[float] = ..., ef: _Optional[float] = ..., group: _Optional[str] = ..., sex: _Optional[str] = ..., pathology: _Optional[str] = ...) -> None: ...
