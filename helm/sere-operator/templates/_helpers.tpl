{{- /* Gives `.Values` what it lacks of values.yaml. `helm upgrade --reuse-values` brings the values of an older chart alone, and
       Helm's own `merge` functions take `false` for missing. Every template begins with this. */ -}}
{{- define "sere-operator.defaults" -}}
{{- include "sere-operator.fill" (list .Values (.Files.Get "files/values.yaml" | fromYaml)) }}
{{- end }}

{{- define "sere-operator.fill" -}}
{{- $values := index . 0 }}
{{- range $key, $default := index . 1 }}
{{- if not (hasKey $values $key) }}{{ $_ := set $values $key $default }}
{{- else if and (kindIs "map" $default) (kindIs "map" (get $values $key)) }}{{ include "sere-operator.fill" (list (get $values $key) $default) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "sere-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "sere-operator.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains (include "sere-operator.name" .) .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else if hasPrefix (printf "%s-" .Release.Name) (include "sere-operator.name" .) }}
{{- /* `helm install sere` makes "sere-operator", not "sere-sere-operator". */ -}}
{{- include "sere-operator.name" . | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "sere-operator.name" .) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "sere-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "sere-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "sere-operator.labels" -}}
{{ include "sere-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "sere-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "sere-operator.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name is needed with serviceAccount.create=false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- /* An image reference from {repository, tag, digest} and the chart's appVersion. */ -}}
{{- define "sere-operator.image" -}}
{{- $image := index . 0 }}{{ $version := index . 1 }}
{{- if $image.digest }}{{ printf "%s@%s" $image.repository $image.digest }}
{{- else }}{{ printf "%s:%s" $image.repository (default $version $image.tag) }}
{{- end }}
{{- end }}

{{- /* Whose a CRD is that stands in the cluster and is not this release's ("" where it is, or where there is none): Helm would
       refuse the whole release because of it. `helm template` sees no cluster and so no such CRD. */ -}}
{{- define "sere-operator.foreignCrd" -}}
{{- $root := index . 0 }}
{{- $found := lookup "apiextensions.k8s.io/v1" "CustomResourceDefinition" "" (index . 1) }}
{{- if and $found (not $root.Values.crds.takeOver) }}
{{- $annotations := default dict $found.metadata.annotations }}
{{- $owner := printf "release %s in namespace %s" (get $annotations "meta.helm.sh/release-name") (get $annotations "meta.helm.sh/release-namespace") }}
{{- if not (hasKey $annotations "meta.helm.sh/release-name") }}nobody's release
{{- else if ne $owner (printf "release %s in namespace %s" $root.Release.Name $root.Release.Namespace) }}{{ $owner }}
{{- end }}
{{- end }}
{{- end }}
