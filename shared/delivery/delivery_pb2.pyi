from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Description(_message.Message):
    __slots__ = ("release", "num_cases", "per_vendor", "datasheet")
    class PerVendorEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    NUM_CASES_FIELD_NUMBER: _ClassVar[int]
    PER_VENDOR_FIELD_NUMBER: _ClassVar[int]
    DATASHEET_FIELD_NUMBER: _ClassVar[int]
    release: str
    num_cases: int
    per_vendor: _containers.ScalarMap[str, int]
    datasheet: bytes
    def __init__(self, release: _Optional[str] = ..., num_cases: _Optional[int] = ..., per_vendor: _Optional[_Mapping[str, int]] = ..., datasheet: _Optional[bytes] = ...) -> None: ...

class StreamRequest(_message.Message):
    __slots__ = ("release", "vendors", "ef_min", "ef_max", "after")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    VENDORS_FIELD_NUMBER: _ClassVar[int]
    EF_MIN_FIELD_NUMBER: _ClassVar[int]
    EF_MAX_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    release: str
    vendors: _containers.RepeatedScalarFieldContainer[str]
    ef_min: float
    ef_max: float
    after: str
    def __init__(self, release: _Optional[str] = ..., vendors: _Optional[_Iterable[str]] = ..., ef_min: _Optional[float] = ..., ef_max: _Optional[float] = ..., after: _Optional[str] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: CaseHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[CaseHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class CaseHeader(_message.Message):
    __slots__ = ("pseudonym", "vendor", "field_strength_t", "ef", "group", "num_bytes", "sha256")
    PSEUDONYM_FIELD_NUMBER: _ClassVar[int]
    VENDOR_FIELD_NUMBER: _ClassVar[int]
    FIELD_STRENGTH_T_FIELD_NUMBER: _ClassVar[int]
    EF_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    pseudonym: str
    vendor: str
    field_strength_t: float
    ef: float
    group: str
    num_bytes: int
    sha256: str
    def __init__(self, pseudonym: _Optional[str] = ..., vendor: _Optional[str] = ..., field_strength_t: _Optional[float] = ..., ef: _Optional[float] = ..., group: _Optional[str] = ..., num_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...
