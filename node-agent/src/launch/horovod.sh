# Horovod's ranks are started by mpirun where this host has one, unless Horovod says that it was built without MPI, or the job that it wants
# gloo: then $1 ranks that run $2 each are started by $4, a program of $3, which meet at the port $5. Who does not know Horovod, or not that
# question, is of a time when it was MPI. A job's variables are left as they are: there are none here.
by_gloo() {
    echo "batchai: Horovod's ranks are started over gloo: $6" >&2
    exec "$3" -c "$4" "$1" "$2" "$5"
}
# Horovod reads it in any case.
case $HOROVOD_CONTROLLER in
[Gg][Ll][Oo][Oo]) by_gloo "$@" "the job's HOROVOD_CONTROLLER is $HOROVOD_CONTROLLER" ;;
[Mm][Pp][Ii]) ;;
*)
    command -v mpirun >/dev/null || by_gloo "$@" "there is no mpirun on the PATH of this node ($PATH)"
    "$3" -c 'import sys
sys.path = [path for path in sys.path if path]
from horovod.common.util import mpi_built
sys.exit(3 if mpi_built() is False else 0)' </dev/null >/dev/null 2>&1
    [ $? != 3 ] || by_gloo "$@" "it was built without MPI"
    ;;
esac
