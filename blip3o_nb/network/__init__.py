"The transformer"
from . import nextdit # joins NETWORKS, and gives BLIP3oDiT its from_nextdit
