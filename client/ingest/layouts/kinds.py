"""The layouts that `fedcmr-client prepare --format` knows. A new one is a file in this folder and a line here."""

from fedcmr.client.ingest.dicom.reader import DICOM
from fedcmr.client.ingest.layouts.acdc import ACDC
from fedcmr.client.ingest.layouts.layout import Layout
from fedcmr.client.ingest.layouts.mnms import MNMS
from fedcmr.client.ingest.layouts.mnms2 import MNMS2
from fedcmr.client.ingest.layouts.nnunet import NNUNET
from fedcmr.client.ingest.layouts.plain import PLAIN
from fedcmr.client.ingest.layouts.sunnybrook import SUNNYBROOK

LAYOUTS: dict[str, Layout] = {
    "dicom": DICOM,
    "acdc": ACDC,
    "mnms": MNMS,
    "mnms2": MNMS2,
    "sunnybrook": SUNNYBROOK,
    "plain": PLAIN,
    "nnunet": NNUNET,
}
