"""A network for other programs, which need neither pliant nor the code of the network.

graph     a model as a graph: ``torch.export`` programs and ONNX models, compared with the model
folder    the folder that holds weights, graphs and their description
"""

from pliant.exporting.folder import FORMATS as FORMATS
from pliant.exporting.folder import check_request as check_request
from pliant.exporting.folder import export as export
from pliant.exporting.folder import write_export as write_export
from pliant.exporting.graph import Portable as Portable
from pliant.exporting.graph import max_difference as max_difference
from pliant.exporting.graph import onnx_session as onnx_session
from pliant.exporting.graph import reason as reason
