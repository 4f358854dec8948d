# Horovod's ranks are started by mpirun where this host has one, unless Horovod says that it was built without MPI, or the job that it wants
# gloo: then $1 ranks that run $2 each are started by $gloo. Who does not know Horovod, or not that question, is of a time when it was MPI.
asked='import sys; from horovod.common.util import mpi_built; sys.exit(3 if mpi_built() is False else 0)'
if [ "$HOROVOD_CONTROLLER" = gloo ] || ! command -v mpirun >/dev/null; then
    over=gloo
else
    "$python" -c "$asked" </dev/null &>/dev/null
    if [ $? = 3 ]; then over=gloo; fi
fi
if [ "$over" = gloo ]; then exec "$python" -c "$gloo" "$1" "$2"; fi
